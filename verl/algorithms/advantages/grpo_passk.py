"""Advantages of the best sample of a group, for pass@k: arXiv:2503.19595."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, on_tokens, outcome
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("grpo_passk")
def compute_grpo_passk_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the best sample of a group adds to the second best; every other sample has advantage 0.

    `A = (R_best - R_second) / (std(R) + epsilon)`, deviation unbiased (ddof 1). Where several samples share the best
    reward, losing one of them loses nothing: all have 0. So has a group of one, which has no second.

    Args:
        token_level_rewards: [B, T]; a sample's reward is the sum of its row.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        epsilon: added to the deviation.
        norm_adv_by_std_in_grpo: divide by the deviation.
        config: the `algorithm` section; its `norm_adv_by_std_in_grpo`, where given, replaces the argument.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 off the mask.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
    reward = outcome(token_level_rewards)
    groups = group(index, reward)
    best = reward == groups.max(reward)
    second = groups.max(torch.where(best, -torch.inf, reward))
    leads = best & (groups.sum(best) == 1) & ~groups.single
    lead = torch.where(leads, reward - second, 0.0)
    if norm_adv_by_std_in_grpo:
        lead = lead / (groups.std(reward) + epsilon)
    return on_tokens(lead, response_mask)
