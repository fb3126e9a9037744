"""REINFORCE++, without a critic and normalised over the batch: arXiv:2501.03262."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, outcome
from verl.algorithms.advantages.registry import register_adv_est
from verl.algorithms.advantages.whitening import whiten


@register_adv_est("reinforce_plus_plus")
def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any | None = None,
    index: np.ndarray | None = None,
    gamma: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Discounted return from each token on, whitened over the batch.

    `G_t = r_t + gamma * G_next`, where next is the next token *of the mask*: what a tool wrote in between costs no
    discount, and a reward that stands on it is not seen.

    Args:
        token_level_rewards: [B, T].
        response_mask: [B, T], 1 where the model made the token.
        config: the `algorithm` section; its `gamma`, where given, replaces the argument.
        index: taken as by every estimator; groups play no part.
        gamma: discount per token.

    Returns:
        advantages (whitened) and returns (G), [B, T] float32, 0 off the mask.
    """
    if config is not None:
        gamma = config.gamma
    # Time first: each step of the scan then touches one run of memory.
    live, rewards = (column.T.contiguous() for column in (response_mask.bool(), token_level_rewards.double()))
    returns = torch.zeros_like(rewards)
    later = torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        later = torch.where(live[t], rewards[t] + gamma * later, later)
        returns[t] = later
    advantages, returns = whiten(returns.T, live.T), torch.where(live, returns, 0.0).T
    return advantages.to(torch.float32).contiguous(), returns.to(torch.float32).contiguous()


@register_adv_est("reinforce_plus_plus_baseline")
def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's reward less its group's mean, laid on its tokens and whitened over the tokens of the batch.

    A group of one counts as one of mean 0.

    Args:
        token_level_rewards: [B, T]; a sample's reward is the sum of its row.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        config: taken as by every estimator; nothing of it plays a part.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 off the mask.
    """
    reward = outcome(token_level_rewards)
    centred = group(index, reward).centred(reward)
    advantages = whiten(centred.unsqueeze(-1).expand(response_mask.shape), response_mask).to(torch.float32)
    return advantages, advantages.clone()
