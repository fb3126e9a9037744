"""Checks of memory estimates: of the host, and of each stage on a device (`rollout.gpu_memory_utilization`)."""

from __future__ import annotations

import copy
import math

from verl.config.actor import ActorConfig
from verl.config.critic import CriticConfig
from verl.config.ppo import PPOConfig
from verl.config.roles import resolve_critic
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.checks.memory_features import Estimate, cheapest_features
from verl.preflight.device_memory import ACTIVATIONS, GENERATION, DeviceMemory, Stage
from verl.preflight.estimate import MemoryEstimate
from verl.preflight.findings import Findings
from verl.preflight.plan import MIN_SHOWN_BYTES
from verl.utils.byte_size import GB, format_bytes, format_gb

_ROLLOUT = "actor_rollout_ref.rollout"
_UTILIZATION = f"{_ROLLOUT}.gpu_memory_utilization"
_TENSOR_PARALLEL = f"{_ROLLOUT}.tensor_model_parallel_size"
# Share of a device's memory; a stage above it gets a warning.
_TIGHT = 0.95
# A suggested gpu_memory_utilization must leave this much for the KV cache.
_MIN_CACHE = 6 * GB
# A cache that holds fewer samples than this gets a warning.
_MIN_CONCURRENT_SAMPLES = 8


def check_host_memory(estimate: MemoryEstimate | None, available: int | None, found: Findings) -> None:
    """Report an estimate above the free memory, both in bytes; None: not known.

    It is a warning, but with offloading an error: pinned memory cannot be swapped out.
    """
    if estimate is None or available is None or estimate.total_bytes <= available:
        return
    if estimate.offloaded_bytes:
        moved = estimate.ranks * estimate.offloaded_bytes
        left = max(0, available - estimate.total_bytes + moved)
        found.errors.append(
            f"offloading to the host needs about {format_bytes(moved)} for {estimate.ranks} rank(s) of a node, and "
            f"{format_bytes(left)} of {format_bytes(available)} of host memory are left beside the rest of the run: "
            "use more nodes (trainer.nnodes), or set one of fsdp_config.param_offload, .optimizer_offload, "
            ".offload_policy and model.enable_activation_offload to False"
        )
        return
    found.warnings.append(
        f"the run needs about {format_bytes(estimate.total_bytes)} of host memory, and {format_bytes(available)} are "
        f"available: lower trainer.n_gpus_per_node, {_ROLLOUT}.max_num_seqs, the micro-batch size or the token budget"
    )


def check_device_memory(config: PPOConfig, memory: DeviceMemory, estimate: Estimate, found: Findings) -> None:
    """Report stages and KV caches that do not fit, with values that would fit.

    Args:
        memory: the estimate of `config`.
        estimate: returns that of another config.
    """
    if memory.cache_bytes <= 0:
        found.errors.append(_no_cache_error(config, memory))
    else:
        _check_cache(config, memory, found)
    for stage in memory.stages:
        if stage.total > memory.capacity:
            found.errors.append(f"{_describe(stage, memory)}: {_remedy(config, stage, memory, estimate)}")
        elif stage.total > _TIGHT * memory.capacity:
            found.warnings.append(
                f"{_describe(stage, memory)}, which leaves little reserve: {_remedy(config, stage, memory, estimate)}"
            )


def _describe(stage: Stage, memory: DeviceMemory) -> str:
    parts = ", ".join(f"{name} {format_gb(part)}" for name, part in stage.parts.items() if part >= MIN_SHOWN_BYTES)
    return f"{stage.name} needs about {format_gb(stage.total)} of a device's {format_gb(memory.capacity)} ({parts})"


def _remedy(config: PPOConfig, stage: Stage, memory: DeviceMemory, estimate: Estimate) -> str:
    """Return the cheapest change of the config with which a stage fits, or that saves most memory in it."""
    rollout = config.actor_rollout_ref.rollout
    features = cheapest_features(config, stage.name, _TIGHT * memory.capacity, estimate)
    if stage.name == GENERATION:
        rest = memory.capacity * _TIGHT - (stage.total - int(memory.capacity * rollout.gpu_memory_utilization))
        lower = math.floor(100 * rest / memory.capacity) / 100
        if lower * memory.capacity > memory.weights_bytes + _MIN_CACHE:
            return f"set {_UTILIZATION}={lower:g} or less" + (f", or {features}" if features else "")
    elif not rollout.free_cache_engine and memory.shared:
        return f"set {_ROLLOUT}.free_cache_engine=True, so that the engine releases its memory in this stage"
    elif stage.parts.get(ACTIVATIONS, 0) > stage.total / 4:
        section = "critic" if stage.name.startswith("critic") else "actor_rollout_ref.actor"
        if not config.actor_rollout_ref.model.enable_gradient_checkpointing:
            return "set actor_rollout_ref.model.enable_gradient_checkpointing=True"
        fewer = _fewer_tokens(config, section)
        if features and not _fits_in_parts(config, stage, estimate):
            return f"{features}; or {fewer}"
        if section != "critic" and config.actor_rollout_ref.model.use_fused_kernels is False:
            return "set actor_rollout_ref.model.use_fused_kernels=null, so that no logits are kept"
        return fewer
    more = _more_devices(memory)
    return f"{features}; or {more}" if features else more


def _fits_in_parts(config: PPOConfig, stage: Stage, estimate: Estimate) -> bool:
    """Return True if a stage fits with micro-batches of one sample, the longest one."""
    smallest = copy.deepcopy(config)
    for section in (smallest.actor_rollout_ref.actor, smallest.critic):
        section.ppo_micro_batch_size_per_gpu, section.ppo_max_token_len_per_gpu = 1, longest_sample(config)
    memory, _ = estimate(smallest)
    return memory is not None and any(
        each.name == stage.name and each.total <= _TIGHT * memory.capacity for each in memory.stages
    )


def _fewer_tokens(config: PPOConfig, section: str) -> str:
    """Return the change that gives each rank fewer tokens of a micro-batch."""
    role: ActorConfig | CriticConfig = config.actor_rollout_ref.actor
    shared = actor_sequence_parallel(config.actor_rollout_ref.actor)
    if section == "critic":
        role, shared = resolve_critic(config), critic_sequence_parallel(config.critic)
    share = f"set {section}.ulysses_sequence_parallel_size={2 * shared}, so that {2 * shared} ranks share each sample"
    if role.use_dynamic_bsz:
        limit = f"{section}.ppo_max_token_len_per_gpu={role.ppo_max_token_len_per_gpu}"
        least = -(-longest_sample(config) // shared)
        return f"lower {limit}" if role.ppo_max_token_len_per_gpu > least else f"lower {limit}, and {share}"
    samples = role.ppo_micro_batch_size_per_gpu or 1
    return share if samples == 1 else f"lower {section}.ppo_micro_batch_size_per_gpu={samples}"


def _more_devices(memory: DeviceMemory) -> str:
    standalone = f"give the replicas their own nodes ({_ROLLOUT}.nnodes), " if memory.shared else ""
    return (
        "raise trainer.n_gpus_per_node or trainer.nnodes, because weights and optimizer are sharded over all ranks, "
        f"{standalone}or train only LoRA adapters (actor_rollout_ref.model.lora_rank=32)"
    )


def _no_cache_error(config: PPOConfig, memory: DeviceMemory) -> str:
    rollout = config.actor_rollout_ref.rollout
    share = format_gb(memory.capacity * rollout.gpu_memory_utilization)
    return (
        f"{_UTILIZATION}={rollout.gpu_memory_utilization:g}: {share} of a device cannot hold the engine's weights "
        f"({format_gb(memory.weights_bytes)} with {_TENSOR_PARALLEL}={rollout.tensor_model_parallel_size}) and a KV "
        "cache; raise one of the two"
    )


def _check_cache(config: PPOConfig, memory: DeviceMemory, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    longest = config.max_model_len
    samples = memory.cache_tokens // longest
    field = f"{_UTILIZATION}={rollout.gpu_memory_utilization:g}"
    if samples < 1:
        found.errors.append(
            f"{field}: the KV cache holds {memory.cache_tokens:,} tokens, and a sample can have {longest:,}; raise it, "
            f"or {_TENSOR_PARALLEL}"
        )
    elif samples < _MIN_CONCURRENT_SAMPLES:
        found.warnings.append(
            f"{field}: the KV cache holds only {samples} samples of {longest:,} tokens at a time, fewer than "
            f"max_num_seqs={rollout.max_num_seqs}; raise it, or {_TENSOR_PARALLEL}"
        )
