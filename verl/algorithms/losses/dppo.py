"""Divergence PPO (arXiv:2602.04879): the trust region bounds a divergence, not the ratio.

The divergence is that of two-valued distributions, the sampled token against all others, since the whole distribution
of the sampling policy is not at hand.
"""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import bounded_log_ratio, clip_range, token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss

_EPSILON = 1e-8


@register_policy_loss("dppo_tv")
def compute_policy_loss_dppo_tv(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-A min(r, c) log_prob, the weight without gradient, of each token inside the trust region; all tensors [B, T].

    With p = exp(log_prob) and q = exp(old_log_prob), a token with A > 0 counts while p - q <= `config.clip_ratio_high`,
    any other while p - q >= -`config.clip_ratio_low`: the bounds are of the total variation. r = p / q, its exponent
    kept in +-20, and c is `config.clip_ratio_c`; the paper advises a large one, 20 say.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the mini-batch's tokens: outside the
        trust region; inside, and r > c; old_log_prob - log_prob.
    """
    low, high = clip_range(config)
    change = (log_prob.exp() - old_log_prob.exp()).detach()
    inside = torch.where(advantages > 0, change <= high, change >= -low)
    return _loss(old_log_prob, log_prob, advantages, response_mask, inside, loss_agg_mode, config, rollout_is_weights)


@register_policy_loss("dppo_kl")
def compute_policy_loss_dppo_kl(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """As `compute_policy_loss_dppo_tv`, with bounds of D = q log(q / p) + (1 - q) log((1 - q) / (1 - p)).

    A token with A > 0 counts while D <= `config.clip_ratio_high` or p <= q, any other while
    D <= `config.clip_ratio_low` or p >= q. 1e-8 is added to 1 - p and 1 - q.
    """
    low, high = clip_range(config)
    divergence, change = _binary_kl(old_log_prob.detach(), log_prob.detach())
    inside = torch.where(advantages > 0, (divergence <= high) | (change <= 0), (divergence <= low) | (change >= 0))
    return _loss(old_log_prob, log_prob, advantages, response_mask, inside, loss_agg_mode, config, rollout_is_weights)


def _binary_kl(old_log_prob: torch.Tensor, log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence, and p - q."""
    old_prob = old_log_prob.exp()
    # expm1 is exact near probability 1; a log-probability may exceed 0 by a rounding error
    old_rest, rest = ((-torch.expm1(x)).clamp(min=0) + _EPSILON for x in (old_log_prob, log_prob))
    divergence = old_prob * (old_log_prob - log_prob) + (1 - old_prob) * (old_rest / rest).log()
    return divergence, log_prob.exp() - old_prob


def _loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    inside: torch.Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    log_ratio = bounded_log_ratio(old_log_prob, log_prob).detach()
    ratio, kept = log_ratio.exp(), inside.to(log_prob.dtype)
    per_token = -advantages * ratio.clamp(max=config.clip_ratio_c) * kept * log_prob
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    shares = {
        "actor/pg_clipfrac": 1 - kept,
        "actor/pg_clipfrac_lower": (ratio > config.clip_ratio_c) * kept,
        "actor/ppo_kl": -log_ratio,
    }
    return loss, token_means(shares, response_mask, config)
