"""REINFORCE++, without a critic and normalized over the batch (arXiv:2501.03262)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import (
    group_samples,
    outcome_reward,
    register_adv_est,
    whiten,
    whitened_on_tokens,
)
from verl.config import AlgorithmConfig


@register_adv_est("reinforce_plus_plus")
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: AlgorithmConfig | None = None,
    index: np.ndarray | None = None,
    gamma: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the discounted return `G_t = r_t + gamma G_next`, whitened over the batch.

    "Next" is the next token in the mask. Text of a tool between two tokens of the model adds no discount, and a reward
    at such a token is ignored.

    Args:
        token_level_rewards: r, [B, T].
        response_mask: [B, T], 1 for a token of the model.
        config: the `algorithm` section; if given, its `gamma` replaces the argument.
        index: not used; every estimator accepts it.
        gamma: discount per token.

    Returns:
        advantages (whitened) and returns (G), [B, T] float32, 0 outside the mask.
    """
    if config is not None:
        gamma = config.gamma
    # Time first: each step of the loop then reads contiguous memory.
    mask, rewards = (column.T.contiguous() for column in (response_mask.bool(), token_level_rewards.double()))
    returns = torch.zeros_like(rewards)
    next_return = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        next_return = torch.where(mask[t], rewards[t] + gamma * next_return, next_return)
        returns[t] = next_return
    advantages, returns = whiten(returns.T, mask.T), torch.where(mask, returns, 0.0).T
    return advantages.to(torch.float32).contiguous(), returns.to(torch.float32).contiguous()


@register_adv_est("reinforce_plus_plus_baseline")
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = whiten(R - mean(R))`, mean per group, whitened over the tokens of the batch.

    A group of one has mean 0.

    Args:
        token_level_rewards: [B, T]; the reward of a sample is the sum of its row.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        config: not used; every estimator accepts it.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 outside the mask.
    """
    reward = outcome_reward(token_level_rewards)
    return whitened_on_tokens(group_samples(index, reward).centered(reward), response_mask)
