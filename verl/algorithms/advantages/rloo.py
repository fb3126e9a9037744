"""REINFORCE with a leave-one-out baseline, RLOO: arXiv:2402.14740."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import Groups, group, on_tokens, outcome
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("rloo")
def compute_rloo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's reward less the mean of the *other* samples of its group, `n / (n - 1) * (R - mean(R))`.

    A group of one has no others, and its advantage is its reward.

    Args:
        token_level_rewards: [B, T]; a sample's reward is the sum of its row.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        config: taken as by every estimator; nothing of it plays a part.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 off the mask.
    """
    reward = outcome(token_level_rewards)
    groups = group(index, reward)
    return on_tokens(torch.where(groups.single, reward, _against_others(reward, groups)), response_mask)


@register_adv_est("rloo_vectorized")
def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`compute_rloo_outcome_advantage`, but a group of one has advantage 0: with nothing to compare, it is left out."""
    reward = outcome(token_level_rewards)
    return on_tokens(_against_others(reward, group(index, reward)), response_mask)


def _against_others(reward: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[B]; 0 in a group of one."""
    scale = groups.size / (groups.size - 1).clamp(min=1)
    return scale * (reward - groups.mean(reward))
