"""REINFORCE with the reward of the greedy response as baseline (ReMax, arXiv:2310.10505)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import register_adv_est, suffix_sums
from verl.config import AlgorithmConfig


@register_adv_est("remax")
def compute_remax_outcome_advantage(
    token_level_rewards: torch.Tensor,
    reward_baselines: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig | None = None,
    index: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A_t = G_t - b`: the reward to go minus the reward of the greedy response to the same prompt.

    Args:
        token_level_rewards: [B, T]; a reward outside the mask is ignored.
        reward_baselines: b, [B], the reward of the greedy response.
        response_mask: [B, T], 1 for a token of the model.
        config: not used; every estimator accepts it.
        index: not used; every estimator accepts it.

    Returns:
        advantages and returns (G, the undiscounted reward to go), [B, T] float32, 0 outside the mask.
    """
    mask = response_mask.bool()
    returns = torch.where(mask, suffix_sums(torch.where(mask, token_level_rewards.double(), 0.0)), 0.0)
    advantages = torch.where(mask, returns - reward_baselines.double().unsqueeze(-1), 0.0)
    return advantages.to(torch.float32), returns.to(torch.float32)
