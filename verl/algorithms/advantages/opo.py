"""On-policy RL with an optimal baseline (OPO, arXiv:2505.23585)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import group_samples, on_tokens, outcome_reward, register_adv_est
from verl.config import AlgorithmConfig


@register_adv_est("opo")
def compute_opo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = R - sum(L R) / sum(L)`, sums over the group, L the length in tokens of the mask.

    The baseline of least variance weights rewards by the squared norm of the gradient; the length approximates this
    norm. A group of one has baseline 0, so its advantage is its reward.

    Args:
        token_level_rewards: [B, T]; the reward of a sample is the sum of its row.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        config: not used; every estimator accepts it.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 outside the mask.
    """
    reward = outcome_reward(token_level_rewards)
    groups = group_samples(index, reward)
    length = response_mask.bool().double().sum(dim=-1)
    # If all responses of a group are empty, no token uses the baseline: any divisor will do.
    baseline = groups.sum(length * reward) / groups.sum(length).clamp(min=1)
    return on_tokens(reward - torch.where(groups.is_single, 0.0, baseline), response_mask)
