"""Whether weight updates may send only what changed, as far as a config tells."""

from __future__ import annotations

from verl.config.rollout import RolloutConfig


def full_update_reason(rollout: RolloutConfig, device: str) -> str | None:
    """Why every weight update of a run sends everything; None where those after the first need not."""
    if rollout.checkpoint_engine.delta == "off":
        return "checkpoint_engine.delta=off"
    if rollout.quantization is not None and rollout.quantization_side == "receiver":
        return "quantization_side=receiver: the engine keeps nothing to change"
    if device == "cuda" and rollout.free_cache_engine:
        return "free_cache_engine: the engine gives its weights up while the trainer works"
    return None
