"""On-policy RL with an optimal baseline, OPO: arXiv:2505.23585."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, on_tokens, outcome
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("opo")
def compute_opo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's reward less its group's, weighted by length: `A = R - sum(L R) / sum(L)`.

    The length L of a response, in tokens of the mask, stands for the squared norm of its gradient, which the baseline
    of least variance is weighted by. A group of one has baseline 0, and its advantage is its reward.

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
    length = response_mask.bool().double().sum(dim=-1)
    # Where all of a group are empty no token is left that a baseline could reach.
    baseline = groups.sum(length * reward) / groups.sum(length).clamp(min=1)
    return on_tokens(reward - torch.where(groups.single, 0.0, baseline), response_mask)
