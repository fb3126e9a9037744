"""Generalized advantage estimation from the values of a critic (GAE, arXiv:1506.02438)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import register_adv_est, whiten
from verl.config import AlgorithmConfig


@register_adv_est("gae")
def compute_gae_advantage_return(
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    config: AlgorithmConfig | None = None,
    index: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A_t = delta_t + gamma lam A_next`, `delta_t = r_t + gamma V_next - V_t`, whitened over the batch.

    "Next" is the next token in the mask; after the last one it is 0. Text of a tool between two tokens of the model
    has no value and no advantage, and a reward at such a token is ignored.

    Args:
        token_level_rewards: r, [B, T].
        values: V, [B, T], the value of the critic before each token; values outside the mask, including NaN, are
            ignored.
        response_mask: [B, T], 1 for a token of the model.
        gamma: discount per token.
        lam: 0 relies on the next value, 1 on the rewards.
        config: the `algorithm` section; if given, its `gamma` and `lam` replace the arguments.
        index: not used; every estimator accepts it.

    Returns:
        advantages (whitened) and returns (`A + V` before whitening, the target of the critic), [B, T] float32, 0
        outside the mask.
    """
    if config is not None:
        gamma, lam = config.gamma, config.lam
    # Time first: each step of the loop then reads contiguous memory.
    mask, rewards, value = (
        column.T.contiguous() for column in (response_mask.bool(), token_level_rewards.double(), values.double())
    )
    advantages = torch.zeros_like(value)
    next_value = torch.zeros_like(value[0])
    next_advantage = torch.zeros_like(next_value)
    for t in reversed(range(len(value))):
        delta = rewards[t] + gamma * next_value - value[t]
        next_advantage = torch.where(mask[t], delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(mask[t], value[t], next_value)
        advantages[t] = next_advantage
    returns = torch.where(mask, advantages + value, 0.0).T.to(torch.float32)
    return whiten(advantages.T, mask.T).to(torch.float32).contiguous(), returns.contiguous()
