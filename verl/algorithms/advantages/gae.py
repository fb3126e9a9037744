"""Generalised advantage estimation from a critic's values, GAE: arXiv:1506.02438."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.registry import register_adv_est
from verl.algorithms.advantages.whitening import whiten


@register_adv_est("gae")
def compute_gae_advantage_return(
    token_level_rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    config: Any | None = None,
    index: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A_t = delta_t + gamma lam A_next`, `delta_t = r_t + gamma V_next - V_t`, then whitened over the batch.

    Next is the next token *of the mask*, and 0 after the last: what a tool wrote in between has no value and no
    advantage of its own, and a reward that stands on it is not seen.

    Args:
        token_level_rewards: [B, T].
        values: [B, T], the critic's value before each token; what stands off the mask, NaN included, is not read.
        response_mask: [B, T], 1 where the model made the token.
        gamma: discount per token.
        lam: 0 trusts the next value, 1 the rewards.
        config: the `algorithm` section; its `gamma` and `lam`, where given, replace the arguments.
        index: taken as by every estimator; groups play no part.

    Returns:
        advantages (whitened) and returns (`A + V` before whitening, what the critic learns), [B, T] float32, 0 off
        the mask.
    """
    if config is not None:
        gamma, lam = config.gamma, config.lam
    # Time first: each step of the scan then touches one run of memory.
    live, rewards, value = (
        column.T.contiguous() for column in (response_mask.bool(), token_level_rewards.double(), values.double())
    )
    advantages = torch.zeros_like(value)
    next_value = torch.zeros_like(value[0])
    carried = torch.zeros_like(next_value)
    for t in reversed(range(len(value))):
        delta = rewards[t] + gamma * next_value - value[t]
        carried = torch.where(live[t], delta + gamma * lam * carried, carried)
        next_value = torch.where(live[t], value[t], next_value)
        advantages[t] = carried
    returns = torch.where(live, advantages + value, 0.0).T.to(torch.float32)
    return whiten(advantages.T, live.T).to(torch.float32).contiguous(), returns.contiguous()
