"""Load a Hugging Face causal language model and shard it over the ranks with FSDP2.

Only rank 0 reads the checkpoint. The other ranks build the model without storage and receive their shards, one
parameter at a time, so a host's memory holds at most one full copy of the model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from verl.config import LoraOptions
from verl.utils.hf_config import ATTENTION_BACKEND, read_config
from verl.workers.engine.attention_choice import AttentionChoice, choose_attention
from verl.workers.engine.lora import add_adapters, has_adapters
from verl.workers.engine.packed_attention import pack_attention
from verl.workers.engine.rope import fix_rope_length
from verl.workers.engine.value_head import HEAD, output_head_keys, read_head, to_value_model

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


def parse_dtype(name: str, field: str) -> torch.dtype:
    """Return the torch dtype of a config value such as `fp32` or `bfloat16`.

    Raises:
        ValueError: unsupported dtype; the message contains the config key `field`.
    """
    if name not in _DTYPES:
        raise ValueError(f"{field}={name!r} is not supported: use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_sharded_model(
    path: str,
    *,
    mesh: DeviceMesh,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    max_model_len: int,
    packs: bool,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    reshard_after_forward: bool = True,
    value_head: bool = False,
    lora: LoraOptions | None = None,
) -> PreTrainedModel:
    """Read a model and shard it: one FSDP unit per decoder layer, and one for the rest.

    The model stays in eval mode, also for updates: train mode turns on dropout, noise on a router and random selection
    of experts, so that an update would compute other log-probabilities than `old_log_probs` and the engine.

    Args:
        path: Hugging Face directory, or name on the hub.
        mesh: one-dimensional mesh of all ranks.
        device: this rank's device.
        dtype: dtype of the sharded parameters, which the optimizer updates.
        compute_dtype: dtype of the gathered parameters and of the activations.
        max_model_len: limit of a sequence in tokens, as in the engine; see `verl.workers.engine.rope`.
        packs: pack the sequences of a micro-batch into one row, if the model can.
        trust_remote_code: run Python code of the model.
        override_config: fields of the model's config to replace; `attn_implementation` selects the attention backend,
            which `verl.workers.engine.attention_choice` otherwise chooses.
        gradient_checkpointing: recompute a layer's activations in the backward pass.
        reshard_after_forward: free a layer's gathered parameters between forward and backward.
        value_head: replace the LM head by a scalar head, see `verl.workers.engine.value_head`.
        lora: add adapters and train only these, see `verl.workers.engine.lora`.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or their shapes differ; the model is not causal;
            `attn_implementation` ignores a part of its attention; gradient checkpointing of a model without layers
            that transformers knows.
    """
    override = dict(override_config or {})
    requested = override.pop(ATTENTION_BACKEND, None)
    section = "critic.model" if value_head else "actor_rollout_ref.model"
    config = read_config(path, trust_remote_code, override, section)
    attention = _choose_on_rank0(mesh, device, config, requested, packs, section, trust_remote_code)
    options = {
        "config": config,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attention.implementation,
    }
    single_rank = mesh.size() == 1
    source = read_checkpoint(path, section, value_head, **options) if mesh.get_rank() == 0 else None
    if source is not None and lora is not None:
        add_adapters(source, lora, fill=True)
    if single_rank:
        assert source is not None
        model = source
        move_model(model, device)
    else:
        model = _model_without_storage(options, value_head, lora)
        _take_dtypes_from_rank0(model, source, mesh, device)
    model.eval()
    fix_rope_length(model, max_model_len)
    if attention.packs:
        pack_attention(model)
    names = decoder_layer_names(model)
    if gradient_checkpointing:
        _checkpoint_layers(model, names, section)
    _shard(model, names, mesh, dtype, compute_dtype, reshard_after_forward, value_head)
    if not single_rank:
        model.to_empty(device=device)
        _distribute_from_rank0(model, source, mesh, device)
    return model


def _choose_on_rank0(
    mesh: DeviceMesh,
    device: torch.device,
    config: PreTrainedConfig,
    requested: str | None,
    packs: bool,
    section: str,
    trust_remote_code: bool,
) -> AttentionChoice:
    """Return the result of `choose_attention` on rank 0, on every rank."""
    choice: list[AttentionChoice | None] = [None]
    if mesh.get_rank() == 0:
        choice = [
            choose_attention(config, requested, packs=packs, section=section, trust_remote_code=trust_remote_code)
        ]
    group = mesh.get_group()
    dist.broadcast_object_list(choice, src=dist.get_global_rank(group, 0), group=group, device=device)
    assert choice[0] is not None
    return choice[0]


def _model_without_storage(options: Mapping[str, Any], value_head: bool, lora: LoraOptions | None) -> PreTrainedModel:
    """Build the model with buffers, but without storage for parameters."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(**options)
    model.tie_weights()  # the parameters without storage are new, hence not tied
    if value_head:
        to_value_model(model)
    if lora is not None:
        add_adapters(model, lora, fill=False)
    return model


def read_checkpoint(path: str, section: str, value_head: bool, **options: Any) -> PreTrainedModel:
    """Read a model with `from_pretrained`, but never initialize weights that the checkpoint lacks.

    The value head is the exception: it starts at zero if the checkpoint has none.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or their shapes differ.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    model, info = loaded
    replaced = output_head_keys(model) if value_head else set()
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(set(map(str, info.get(problem) or ())) - replaced)
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ValueError(
                f"{section}.path={path!r} does not match its config.json, {problem}: {shown}; "
                "use a complete checkpoint of this architecture"
            )
    if value_head:
        head = read_head(path, info.get("unexpected_keys") or ())
        to_value_model(model, head)
        if head is not None:
            logger.info("%s: the checkpoint's scalar head is used as the value head", path)
    elif info.get("unexpected_keys"):
        logger.warning("%s: the model does not use these weights: %s", path, sorted(info["unexpected_keys"])[:5])
    return model


def decoder_layer_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the repeated layers, only the outermost ones, in the order of the model."""
    classes = set(model._no_split_modules or ())
    names: list[str] = []
    for name, module in model.named_modules():
        kind = type(module).__name__.removeprefix("FSDP")
        if kind in classes and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    return names


def _checkpoint_layers(model: PreTrainedModel, names: list[str], section: str) -> None:
    """Recompute the activations of each layer in the backward pass.

    transformers' own switch has no effect in eval mode. The forward is set on the instance, inside FSDP's hooks, so a
    recomputation finds the gathered parameters.
    """
    if not names:
        raise ValueError(
            f"{section}.enable_gradient_checkpointing=True: {type(model).__name__} does not name its layers "
            "(_no_split_modules); set it to False"
        )
    for name in names:
        layer = model.get_submodule(name)
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _shard(
    model: PreTrainedModel,
    layers: list[str],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool,
    value_head: bool,
) -> None:
    policy = MixedPrecisionPolicy(
        # Adapters are float32 for any dtype of the model.
        param_dtype=None if compute_dtype == dtype and not has_adapters(model) else compute_dtype,
        reduce_dtype=torch.float32,
    )
    for name in layers:
        layer = model.get_submodule(name)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    if value_head:
        # Values need a finer resolution than bfloat16.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(model.get_submodule(HEAD), mesh=mesh, mp_policy=exact, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the counts of the whole mini-batch, so gradients are summed over ranks,
            # not averaged. A plain sum is exact; dividing by the ranks and multiplying again is exact only for powers
            # of 2.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def move_model(model: PreTrainedModel, device: torch.device) -> None:
    """Move the model's parameters and buffers to a device in place."""
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` hides `self`


@torch.no_grad()
def _take_dtypes_from_rank0(
    model: PreTrainedModel, source: PreTrainedModel | None, mesh: DeviceMesh, device: torch.device
) -> None:
    """Give parameters and buffers the dtypes of rank 0's full model `source`; None on the other ranks.

    Only `from_pretrained` keeps some of them in float32, such as the bias of DeepSeek-V3's routers.
    """
    group = mesh.get_group()
    dtypes = [None if source is None else {name: tensor.dtype for name, tensor in _tensors(source)}]
    dist.broadcast_object_list(dtypes, src=dist.get_global_rank(group, 0), group=group, device=device)
    assert dtypes[0] is not None
    for name, tensor in _tensors(model):
        tensor.data = tensor.data.to(dtypes[0][name])


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


@torch.no_grad()
def _distribute_from_rank0(
    model: PreTrainedModel, source: PreTrainedModel | None, mesh: DeviceMesh, device: torch.device
) -> None:
    """Fill the shards of all ranks from rank 0's full model `source`; None on the other ranks."""
    group = mesh.get_group()
    first = dist.get_global_rank(group, 0)
    parameters = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        if source is not None:
            full = parameters.pop(name).detach().to(device)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        shard = distribute_tensor(full, mesh, parameter.placements)
        parameter.to_local().copy_(shard.to_local())
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=first, group=group)
    # The conversions between the checkpoint and the model, which only `from_pretrained` sets.
    conversions = [getattr(source, "_weight_conversions", None)]
    dist.broadcast_object_list(conversions, src=first, group=group, device=device)
    model._weight_conversions = conversions[0]  # type: ignore[assignment]  # nn.Module types attributes as tensors
