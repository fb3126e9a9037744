"""REINFORCE against the reward of the greedy answer, ReMax: arXiv:2310.10505."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import suffix_sums
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("remax")
def compute_remax_outcome_advantage(
    token_level_rewards: torch.Tensor,
    reward_baselines: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any | None = None,
    index: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward from each token on, less the reward of the greedy answer to the same prompt.

    Args:
        token_level_rewards: [B, T]; a reward that stands off the mask is not seen.
        reward_baselines: [B], the greedy answer's reward.
        response_mask: [B, T], 1 where the model made the token.
        config: taken as by every estimator; nothing of it plays a part.
        index: taken as by every estimator; groups play no part.

    Returns:
        advantages and returns (the undiscounted reward to go), [B, T] float32, 0 off the mask.
    """
    live = response_mask.bool()
    returns = torch.where(live, suffix_sums(torch.where(live, token_level_rewards.double(), 0.0)), 0.0)
    advantages = torch.where(live, returns - reward_baselines.double().unsqueeze(-1), 0.0)
    return advantages.to(torch.float32), returns.to(torch.float32)
