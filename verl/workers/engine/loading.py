"""Load a Hugging Face causal language model and shard it over the ranks with FSDP2.

Only rank 0 reads the checkpoint. The other ranks build the model without storage and receive their shards, one
parameter at a time, so a host's memory holds at most one full copy of the model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from verl.config import FSDPConfig, LoraOptions
from verl.utils.hf_config import ATTENTION_BACKEND, read_config
from verl.workers.engine.activations import ActivationOffload
from verl.workers.engine.attention_choice import AttentionChoice, choose_attention
from verl.workers.engine.lora import add_adapters, has_adapters
from verl.workers.engine.mesh import EngineMesh
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


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 gathers weights and reduces gradients.

    Attributes:
        reshard_after_forward: free a layer's gathered parameters between forward and backward.
        forward_prefetch: gather the next layer before a layer computes.
        reduce_dtype: dtype in which gradients are summed over the ranks; that of a value head is float32.
        on_host: keep the shards of parameters and gradients in host memory.
    """

    reshard_after_forward: bool = True
    forward_prefetch: bool = False
    reduce_dtype: torch.dtype = torch.float32
    on_host: bool = False

    @classmethod
    def of(cls, config: FSDPConfig, *, on_host: bool) -> Sharding:
        """Return what an `fsdp_config` section sets; `on_host` is its `offload_policy` where the host is elsewhere."""
        reduce_dtype = parse_dtype(config.mixed_precision.reduce_dtype or "float32", "mixed_precision.reduce_dtype")
        return cls(config.reshard_after_forward, config.forward_prefetch, reduce_dtype, on_host)


def load_sharded_model(
    path: str,
    *,
    mesh: EngineMesh,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    max_model_len: int,
    packs: bool,
    trust_remote_code: bool = False,
    override_config: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool = False,
    activations: ActivationOffload | None = None,
    sharding: Sharding | None = None,
    value_head: bool = False,
    lora: LoraOptions | None = None,
) -> PreTrainedModel:
    """Read a model and shard it: one FSDP unit per decoder layer, and one for the rest.

    The model stays in eval mode, also for updates: train mode turns on dropout, noise on a router and random selection
    of experts, so that an update would compute other log-probabilities than `old_log_probs` and the engine.

    Args:
        path: Hugging Face directory, or name on the hub.
        mesh: the ranks, and how they share the weights.
        device: this rank's device.
        dtype: dtype of the sharded parameters, which the optimizer updates.
        compute_dtype: dtype of the gathered parameters and of the activations.
        max_model_len: limit of a sequence in tokens, as in the engine; see `verl.workers.engine.rope`.
        packs: pack the sequences of a micro-batch into one row, if the model can.
        trust_remote_code: run Python code of the model.
        override_config: fields of the model's config to replace; `attn_implementation` selects the attention backend,
            which `verl.workers.engine.attention_choice` otherwise chooses.
        gradient_checkpointing: recompute a layer's activations in the backward pass.
        activations: keeps the inputs of checkpointed layers; None to keep them on the device.
        sharding: how FSDP2 gathers and reduces; None for its defaults here.
        value_head: replace the LM head by a scalar head, see `verl.workers.engine.value_head`.
        lora: add adapters and train only these, see `verl.workers.engine.lora`.

    Raises:
        ValueError: the checkpoint lacks weights of the model, or their shapes differ; the model is not causal;
            `attn_implementation` ignores a part of its attention; ranks cannot share its sequences; gradient
            checkpointing of a model without layers that transformers knows.
    """
    override = dict(override_config or {})
    requested = override.pop(ATTENTION_BACKEND, None)
    section = "critic.model" if value_head else "actor_rollout_ref.model"
    config = read_config(path, trust_remote_code, override, section)
    attention = _choose_on_rank0(mesh.ranks, device, config, requested, packs, section, trust_remote_code)
    if mesh.sequence.size > 1 and not attention.packs:
        raise ValueError(
            f"{section}.path={path}: ulysses_sequence_parallel_size above 1 is not supported for "
            f"{type(config).__name__} with attn_implementation={attention.implementation} and use_remove_padding="
            f"{packs}: ranks can share sequences only if tokens are mixed by torch's causal attention alone, in packed "
            "rows; use ulysses_sequence_parallel_size=1"
        )
    options = {
        "config": config,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": attention.implementation,
    }
    single_rank = mesh.ranks.size() == 1
    source = read_checkpoint(path, section, value_head, **options) if mesh.ranks.get_rank() == 0 else None
    if source is not None and lora is not None:
        add_adapters(source, lora, fill=True)
    if single_rank:
        assert source is not None
        model = source
        move_model(model, device)
    else:
        model = _model_without_storage(options, value_head, lora)
        _take_dtypes_from_rank0(model, source, mesh.ranks, device)
    model.eval()
    fix_rope_length(model, max_model_len)
    if attention.packs:
        pack_attention(model)
    names = decoder_layer_names(model)
    if gradient_checkpointing:
        _checkpoint_layers(model, names, section, activations)
    sharding = sharding or Sharding()
    if mesh.tensor is not None:
        mesh.tensor.divide(model, names)
    _shard(model, names, mesh, dtype, compute_dtype, sharding, value_head)
    if not single_rank:
        model.to_empty(device="cpu" if sharding.on_host else device)
        _move_buffers(model, device)
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


def _checkpoint_layers(
    model: PreTrainedModel, names: list[str], section: str, activations: ActivationOffload | None
) -> None:
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
        if activations is not None:
            layer.forward = activations.around(layer.forward)


def _shard(
    model: PreTrainedModel,
    layers: list[str],
    mesh: EngineMesh,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    sharding: Sharding,
    value_head: bool,
) -> None:
    policy = MixedPrecisionPolicy(
        # Adapters are float32 for any dtype of the model.
        param_dtype=None if compute_dtype == dtype and not has_adapters(model) else compute_dtype,
        reduce_dtype=sharding.reduce_dtype,
    )
    options: dict[str, Any] = {"mesh": mesh.weights}
    if sharding.on_host:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.ranks.device_type != "cpu")
    reshard = sharding.reshard_after_forward
    units: list[Any] = [model.get_submodule(name) for name in layers]
    for layer in units:
        fully_shard(layer, **options | {"mesh": mesh.layers}, mp_policy=policy, reshard_after_forward=reshard)
    if value_head:
        # Values need a finer resolution than bfloat16.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        fully_shard(model.get_submodule(HEAD), **options, mp_policy=exact, reshard_after_forward=reshard)
    fully_shard(model, **options, mp_policy=policy)
    if sharding.forward_prefetch:
        for unit, following in itertools.pairwise([model, *units]):
            unit.set_modules_to_forward_prefetch([following])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the counts of the whole mini-batch, so gradients are summed over ranks,
            # not averaged. A plain sum is exact; dividing by the ranks and multiplying again is exact only for powers
            # of 2.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if mesh.tensor is not None:
        # The ranks that share layers have the same gradient of the parameters that they do not divide.
        cast(FSDPModule, model).set_gradient_divide_factor(mesh.tensor.ranks.size)


def move_model(model: PreTrainedModel, device: torch.device) -> None:
    """Move the model's parameters and buffers to a device in place."""
    model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of `to` hides `self`


def _move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move the buffers to the device that computes."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


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
    model: PreTrainedModel, source: PreTrainedModel | None, mesh: EngineMesh, device: torch.device
) -> None:
    """Fill the shards of all ranks from rank 0's full model `source`; None on the other ranks."""
    group = mesh.group
    first = dist.get_global_rank(group, 0)
    parameters = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        part = parameter if mesh.tensor is None else mesh.tensor.whole(name, parameter)
        assert isinstance(part, DTensor)
        if source is not None:
            full = parameters.pop(name).detach().to(device)
        else:
            full = torch.empty(part.shape, dtype=parameter.dtype, device=device)
        shard = distribute_tensor(full, part.device_mesh, part.placements)
        part.to_local().copy_(shard.to_local())
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=first, group=group)
    # The conversions between the checkpoint and the model, which only `from_pretrained` sets.
    conversions = [getattr(source, "_weight_conversions", None)]
    dist.broadcast_object_list(conversions, src=first, group=group, device=device)
    model._weight_conversions = conversions[0]  # type: ignore[assignment]  # nn.Module types attributes as tensors
