"""Each stage of a step against the memory of a device."""

from __future__ import annotations

import math

from verl.config.ppo import PPOConfig
from verl.preflight.device_memory import DeviceMemory, Stage
from verl.preflight.findings import Findings

_UTILIZATION = "actor_rollout_ref.rollout.gpu_memory_utilization"
_TIGHT = 0.95


def check_device_memory(config: PPOConfig, memory: DeviceMemory, found: Findings) -> None:
    """What does not fit, with sizes that would."""
    if memory.cache_bytes <= 0:
        found.errors.append(_no_cache(config, memory))
    else:
        _check_cache(config, memory, found)
    for stage in memory.stages:
        if stage.total > memory.capacity:
            found.errors.append(f"{_what(stage, memory)}: {_way_out(config, stage, memory)}")
        elif stage.total > _TIGHT * memory.capacity:
            found.warnings.append(f"{_what(stage, memory)}, which leaves little: {_way_out(config, stage, memory)}")


def _what(stage: Stage, memory: DeviceMemory) -> str:
    parts = ", ".join(f"{name} {_gb(part)}" for name, part in stage.parts.items() if part >= 5e7)
    return f"{stage.name} takes about {_gb(stage.total)} of a device's {_gb(memory.capacity)} ({parts})"


def _way_out(config: PPOConfig, stage: Stage, memory: DeviceMemory) -> str:
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    if stage.name == "generation":
        rest = memory.capacity * _TIGHT - (stage.total - int(memory.capacity * rollout.gpu_memory_utilization))
        lower = math.floor(100 * rest / memory.capacity) / 100
        if lower * memory.capacity > memory.weights_bytes + 6e9:
            return f"set {_UTILIZATION}={lower:g} or less"
        return _more_devices(memory)
    if not rollout.free_cache_engine and memory.shared:
        return "set actor_rollout_ref.rollout.free_cache_engine=True, so that the engine gives its memory up meanwhile"
    if stage.parts.get("activations and logits", 0) > stage.total / 4:
        section = "critic" if stage.name.startswith("critic") else "actor_rollout_ref.actor"
        if not config.actor_rollout_ref.model.enable_gradient_checkpointing:
            return "set actor_rollout_ref.model.enable_gradient_checkpointing=True"
        size = "ppo_max_token_len_per_gpu" if actor.use_dynamic_bsz else "ppo_micro_batch_size_per_gpu"
        return f"lower {section}.{size}={getattr(actor, size)}"
    return _more_devices(memory)


def _more_devices(memory: DeviceMemory) -> str:
    apart = "give the replicas nodes of their own (actor_rollout_ref.rollout.nnodes), " if memory.shared else ""
    return (
        "raise trainer.n_gpus_per_node or trainer.nnodes, among which the weights and the optimizer are sharded, "
        f"{apart}or train adapters alone (actor_rollout_ref.model.lora_rank=32)"
    )


def _no_cache(config: PPOConfig, memory: DeviceMemory) -> str:
    rollout = config.actor_rollout_ref.rollout
    return (
        f"{_UTILIZATION}={rollout.gpu_memory_utilization:g}: {_gb(memory.capacity * rollout.gpu_memory_utilization)} "
        f"of a device do not hold the engine's weights ({_gb(memory.weights_bytes)} with "
        f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size}) and a cache; "
        "raise either"
    )


def _check_cache(config: PPOConfig, memory: DeviceMemory, found: Findings) -> None:
    rollout, data = config.actor_rollout_ref.rollout, config.data
    longest = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    at_once = memory.cache_tokens // longest
    if at_once < 1:
        found.errors.append(
            f"{_UTILIZATION}={rollout.gpu_memory_utilization:g}: the cache holds {memory.cache_tokens:,} tokens, a "
            f"sample may have {longest:,}; raise it, or actor_rollout_ref.rollout.tensor_model_parallel_size"
        )
    elif at_once < 8:
        found.warnings.append(
            f"{_UTILIZATION}={rollout.gpu_memory_utilization:g}: the cache holds {at_once} samples of {longest:,} "
            f"tokens at a time, where max_num_seqs={rollout.max_num_seqs} may run; raise it, or "
            "actor_rollout_ref.rollout.tensor_model_parallel_size"
        )


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"
