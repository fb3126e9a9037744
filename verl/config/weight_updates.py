"""Rules about weight updates that follow from the config: the transport, and why updates must be full."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.rollout import RolloutConfig

# Transports between nodes by device, the fastest first.
BACKENDS = {"cpu": ("gloo",), "cuda": ("nccl", "gloo"), "npu": ("hccl", "nccl", "gloo")}


def resolve_backend(config: PPOConfig, device: str) -> str:
    """Return the transport of weight updates; `naive` is shared memory.

    With several trainer nodes, `checkpoint_engine.backend=naive` means the fastest transport of the device.
    """
    backend = config.actor_rollout_ref.rollout.checkpoint_engine.backend
    return BACKENDS[device][0] if backend == "naive" and config.trainer.nnodes > 1 else backend


def full_update_reason(rollout: RolloutConfig, device: str) -> str | None:
    """Return why every weight update must be full; None if updates after the first one may send a delta."""
    if rollout.checkpoint_engine.delta == "off":
        return "checkpoint_engine.delta=off"
    if rollout.quantization is not None and rollout.quantization_side == "receiver":
        return "quantization_side=receiver: the engine quantizes, so a delta cannot be applied"
    if device == "cuda" and rollout.free_cache_engine:
        return "free_cache_engine: the engine frees its weights while the trainer works"
    return None
