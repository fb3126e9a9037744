"""Group policy gradient, GPG: arXiv:2504.02546."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, on_tokens, outcome
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("gpg")
def compute_gpg_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    f_norm: float = 1.0,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's reward less its group's mean, scaled up by how few samples were rewarded at all.

    `A = alpha * (R - mean(R)) / f_norm`, `alpha = B / max(samples with R != 0, 1)` over the whole batch. A group of one
    counts as one of mean 0.

    Args:
        token_level_rewards: [B, T]; a sample's reward is the sum of its row.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        f_norm: what the centred rewards are divided by.
        config: taken as by every estimator; nothing of it plays a part.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 off the mask.
    """
    reward = outcome(token_level_rewards)
    alpha = reward.numel() / reward.count_nonzero().clamp(min=1)
    return on_tokens(alpha * group(index, reward).centred(reward) / f_norm, response_mask)
