"""`trainer.rollout_lag` against the placement of the replicas and the way they generate."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings


def check_lag(config: PPOConfig, device: str, found: Findings) -> None:
    """To generate while it trains, an engine has to have memory of its own."""
    rollout, lag = config.actor_rollout_ref.rollout, config.trainer.rollout_lag
    if not lag:
        return
    if device != "cpu" and not rollout.nnodes:
        found.errors.append(
            f"trainer.rollout_lag={lag} with actor_rollout_ref.rollout.nnodes=0: replicas and trainer take turns with "
            "the memory of the same devices; give the replicas devices of their own with "
            "actor_rollout_ref.rollout.nnodes=1 and .n_gpus_per_node, or use trainer.rollout_lag=0"
        )
    if rollout.partial_rollout:
        found.errors.append(
            f"trainer.rollout_lag={lag} with actor_rollout_ref.rollout.partial_rollout=True: both generate ahead, one "
            "whole batches and the other what is not done; use one of the two"
        )
