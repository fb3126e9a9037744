"""Advantage of the best sample of a group only, for pass@k (arXiv:2503.19595)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import group_samples, on_tokens, outcome_reward, register_adv_est
from verl.config import AlgorithmConfig


@register_adv_est("grpo_passk")
def compute_grpo_passk_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = (R_best - R_second) / (std(R) + epsilon)` for the best sample of a group; 0 for all others.

    The std is unbiased (ddof 1). If several samples share the best reward, all have advantage 0: the group loses
    nothing without one of them. A group of one has no second sample and advantage 0.

    Args:
        token_level_rewards: [B, T]; the reward of a sample is the sum of its row.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        epsilon: added to the std.
        norm_adv_by_std_in_grpo: divide by the std.
        config: the `algorithm` section; if given, its `norm_adv_by_std_in_grpo` replaces the argument.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 outside the mask.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
    reward = outcome_reward(token_level_rewards)
    groups = group_samples(index, reward)
    best = reward == groups.max(reward)
    second = groups.max(torch.where(best, -torch.inf, reward))
    leads = best & (groups.sum(best) == 1) & ~groups.is_single
    lead = torch.where(leads, reward - second, 0.0)
    if norm_adv_by_std_in_grpo:
        lead = lead / (groups.std(reward) + epsilon)
    return on_tokens(lead, response_mask)
