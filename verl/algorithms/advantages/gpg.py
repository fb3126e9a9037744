"""Group policy gradient (GPG, arXiv:2504.02546)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import group_samples, on_tokens, outcome_reward, register_adv_est
from verl.config import AlgorithmConfig


@register_adv_est("gpg")
def compute_gpg_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    f_norm: float = 1.0,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = alpha (R - mean(R)) / f_norm`, `alpha = B / max(number of samples with R != 0, 1)`.

    The mean is that of the group; alpha is computed over the whole batch and grows as fewer samples are rewarded. A
    group of one has mean 0.

    Args:
        token_level_rewards: [B, T]; the reward of a sample is the sum of its row.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        f_norm: divisor of the centered rewards.
        config: not used; every estimator accepts it.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 outside the mask.
    """
    reward = outcome_reward(token_level_rewards)
    alpha = reward.numel() / reward.count_nonzero().clamp(min=1)
    return on_tokens(alpha * group_samples(index, reward).centered(reward) / f_norm, response_mask)
