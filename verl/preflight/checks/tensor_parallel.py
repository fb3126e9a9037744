"""Checks of `tensor_parallel_size` of the trainer: ranks, keys that it does not go with, and models that it divides."""

from __future__ import annotations

from typing import NamedTuple

from verl.config.actor import FSDPConfig
from verl.config.ppo import PPOConfig
from verl.config.qat import qat_mode
from verl.config.roles import needs_critic, needs_ref
from verl.config.sequence_parallel import actor_sequence_parallel, ref_sequence_parallel
from verl.preflight.findings import Findings
from verl.preflight.placement import trainer_ranks
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.formats import MX_BLOCK_SIZE

_KEY = "tensor_parallel_size"
_MODEL = "actor_rollout_ref.model"
# Model types whose divided layers are tested.
_TYPES = frozenset(("gemma3_text", "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"))
_EXPERTS = ("num_experts", "num_local_experts")
# Fields that add a bias to a layer whose inputs are divided, and the types that read them.
_BIASES = {"attention_bias": ("gemma3_text", "llama", "qwen3", "qwen3_moe"), "mlp_bias": ("llama",)}


class _Role(NamedTuple):
    """A model whose layers ranks share: the section of its sharding, and the ranks that share sequences."""

    name: str
    section: FSDPConfig
    sequence_parallel: int

    @property
    def field(self) -> str:
        return f"{self.name}.{_KEY}={self.section.tensor_parallel_size}"


def check_tensor_parallel(config: PPOConfig, found: Findings) -> None:
    """Check that the sizes divide the ranks, and that no other key needs what ranks that share layers cannot do."""
    critic, trainer, ranks = config.critic.fsdp, config.trainer, trainer_ranks(config)
    if needs_critic(config) and critic.tensor_parallel_size > 1:
        found.errors.append(
            f"critic.fsdp.{_KEY}={critic.tensor_parallel_size}: not supported for the critic, which can train beside "
            "an actor whose layers are shared; use 1"
        )
    for role in _roles(config):
        size, section = role.section.tensor_parallel_size, role.section
        if ranks % size:
            sizes = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
            found.add_size_error(
                f"{role.field}: must divide the {ranks} ranks of the trainer (trainer.n_gpus_per_node="
                f"{trainer.n_gpus_per_node} x trainer.nnodes={trainer.nnodes}); use one of {sizes}"
            )
        elif trainer.n_gpus_per_node % size:
            found.warnings.append(
                f"{role.field}: with trainer.n_gpus_per_node={trainer.n_gpus_per_node}, ranks of different nodes share "
                "layers and sum their outputs, which the network between nodes slows down"
            )
        if role.sequence_parallel > 1:
            found.errors.append(
                f"{role.field}: not supported with ulysses_sequence_parallel_size={role.sequence_parallel}; set one "
                "of the two to 1"
            )
        if 0 < section.fsdp_size < ranks:
            found.errors.append(
                f"{role.field}: not supported with {role.name}.fsdp_size={section.fsdp_size}; use fsdp_size=-1, which "
                f"shards each part of a layer over {max(1, ranks // size)} ranks"
            )
        if section.offload_policy:
            found.errors.append(
                f"{role.field}: not supported with {role.name}.offload_policy=True; use param_offload=True and "
                "optimizer_offload=True"
            )
        model = config.actor_rollout_ref.model
        if model.lora_rank > 0 or model.lora_adapter_path is not None:
            found.errors.append(
                f"{role.field}: not supported with LoRA ({_MODEL}.lora_rank, .lora_adapter_path); use {_KEY}=1"
            )


def check_divided_layers(config: PPOConfig, files: ModelFiles, found: Findings) -> None:
    """Check that ranks can share the layers of the policy.

    Args:
        files: the model with `override_config`.
    """
    for role in _roles(config):
        if not files.whole_config:
            continue  # the model is known by name only
        kind = str(files.config.get("model_type"))
        if kind not in _TYPES or (config.actor_rollout_ref.model.trust_remote_code and "auto_map" in files.config):
            found.errors.append(
                f"{role.field}: not supported for {files.path} (model_type {kind}"
                f"{', with code of its own' if kind in _TYPES else ''}): tested with {', '.join(sorted(_TYPES))}; "
                f"use {_KEY}=1"
            )
            continue
        _check_numbers(role, files, found)
        for name, kinds in _BIASES.items():
            if files.config.get(name) and kind in kinds:
                found.errors.append(
                    f"{role.field}: {files.path} has {name}, and a bias of a layer whose inputs are divided is not "
                    f"supported; use {_KEY}=1"
                )
        if qat_mode(role.section, config.actor_rollout_ref.rollout) is not None:
            _check_blocks(role, files, trainer_ranks(config), found)


def _check_numbers(role: _Role, files: ModelFiles, found: Findings) -> None:
    size = role.section.tensor_parallel_size
    experts = files.number(*_EXPERTS)
    numbers = {"query heads": files.heads, "key-value heads": files.kv_heads, "experts of each layer": experts}
    if experts is None or files.config.get("mlp_only_layers") or (files.number("decoder_sparse_step") or 1) > 1:
        numbers["inner features (intermediate_size) of each MLP"] = files.number("intermediate_size")
    for name, number in numbers.items():
        if number is not None and number % size:
            sizes = ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)
            found.errors.append(
                f"{role.field}: must divide the {number} {name} of {files.path}, because each rank computes some of "
                f"them; use one of {sizes}"
            )


def _check_blocks(role: _Role, files: ModelFiles, ranks: int, found: Findings) -> None:
    """Check that no block of numbers with a common scale is divided, so that each rank rounds its part as a whole."""
    size, heads, head_dim = role.section.tensor_parallel_size, files.heads, files.head_dim
    inputs = {"intermediate_size": files.number("intermediate_size")}
    if heads is not None and head_dim is not None:
        inputs["query heads x head_dim"] = heads * head_dim
    for name, number in inputs.items():
        if number is not None and number % (size * MX_BLOCK_SIZE):
            found.errors.append(
                f"{role.field}: with quantization-aware training it must divide {name}={number} of {files.path} into "
                f"multiples of {MX_BLOCK_SIZE}, which have a common scale; use a smaller size, or {role.name}.qat."
                "enable=False"
            )
    if files.hidden is not None and files.hidden % ranks:
        found.errors.append(
            f"{role.field}: with quantization-aware training the {ranks} ranks of the trainer must divide hidden_size="
            f"{files.hidden} of {files.path}; change the ranks, or set {role.name}.qat.enable=False"
        )


def _roles(config: PPOConfig) -> list[_Role]:
    roles = config.actor_rollout_ref
    found = [
        _Role("actor_rollout_ref.actor.fsdp_config", roles.actor.fsdp_config, actor_sequence_parallel(roles.actor))
    ]
    if needs_ref(config):
        shared = ref_sequence_parallel(roles.ref, roles.actor)
        found.append(_Role("actor_rollout_ref.ref.fsdp_config", roles.ref.fsdp_config, shared))
    return [role for role in found if role.section.tensor_parallel_size > 1]
