"""`actor_rollout_ref.rollout.partial_rollout` against what it needs of the batch and of the algorithm."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings

_KEY = "actor_rollout_ref.rollout.partial_rollout=True"


def check_partial_rollout(config: PPOConfig, found: Findings) -> None:
    """More prompts have to be under way than a step takes, and those carried over have to fit into the next step."""
    if not config.actor_rollout_ref.rollout.partial_rollout:
        return
    needed, under_way = config.data.train_batch_size, config.data.gen_batch_size
    if under_way is None:
        found.errors.append(
            f"data.gen_batch_size is not set: with {_KEY} it is how many prompts are under way, more than the "
            f"data.train_batch_size={needed} that a step takes; use at most {2 * needed}"
        )
    elif not needed < under_way <= 2 * needed:
        found.errors.append(
            f"data.gen_batch_size={under_way} with {_KEY}: more prompts than data.train_batch_size={needed} have to be "
            f"under way, and at most twice as many, so that those left over fit into the next step; use "
            f"{needed + 1} to {2 * needed}"
        )
    if config.algorithm.filter_groups.enable:
        found.errors.append(
            f"algorithm.filter_groups.enable=True with {_KEY}: a step would have to wait for prompts that replace the "
            "dropped ones, which is not supported yet; use one of the two"
        )
