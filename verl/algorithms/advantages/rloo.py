"""REINFORCE with a leave-one-out baseline (RLOO, arXiv:2402.14740)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import Groups, group_samples, on_tokens, outcome_reward, register_adv_est
from verl.config import AlgorithmConfig


@register_adv_est("rloo")
def compute_rloo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the reward minus the mean of the other n - 1 samples of the group: `A = n / (n - 1) (R - mean(R))`.

    In a group of one the advantage is the reward.

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
    return on_tokens(torch.where(groups.is_single, reward, _leave_one_out(reward, groups)), response_mask)


@register_adv_est("rloo_vectorized")
def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `compute_rloo_outcome_advantage`, but with advantage 0 in a group of one, which has no comparison."""
    reward = outcome_reward(token_level_rewards)
    return on_tokens(_leave_one_out(reward, group_samples(index, reward)), response_mask)


def _leave_one_out(reward: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Return [B] n / (n - 1) (R - mean(R)); 0 in a group of one."""
    scale = groups.size / (groups.size - 1).clamp(min=1)
    return scale * (reward - groups.mean(reward))
