"""Divergence PPO (arXiv:2602.04879): the trust region bounds a divergence, not the ratio.

The divergence is between two-valued distributions: the sampled token against all other tokens. The full distribution
of the sampling policy is not available.
"""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    bounded_log_ratio,
    clip_range,
    register_policy_loss,
    require_config,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig

_EPSILON = 1e-8


@register_policy_loss("dppo_tv")
def compute_policy_loss_dppo_tv(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the DPPO loss with bounds on the total variation; all tensors are [B, T].

    Per token: -sg(min(r, c)) A log_prob inside the trust region, 0 outside. With p = exp(log_prob) and
    q = exp(old_log_prob), a token with A > 0 is inside if p - q <= high, any other token if p - q >= -low.

    The paper recommends a large c, for example 20.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the tokens of the mini-batch: outside
        the trust region; inside, and r > c; old_log_prob - log_prob.
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
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the loss of `compute_policy_loss_dppo_tv` with bounds on a KL divergence D.

    D = q log(q / p) + (1 - q) log((1 - q) / (1 - p)), with 1e-8 added to 1 - p and 1 - q. A token with A > 0 is inside
    if D <= high or p <= q, any other token if D <= low or p >= q.
    """
    low, high = clip_range(config)
    divergence, change = _binary_kl(old_log_prob.detach(), log_prob.detach())
    inside = torch.where(advantages > 0, (divergence <= high) | (change <= 0), (divergence <= low) | (change >= 0))
    return _loss(old_log_prob, log_prob, advantages, response_mask, inside, loss_agg_mode, config, rollout_is_weights)


def _binary_kl(old_log_prob: torch.Tensor, log_prob: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D and p - q."""
    old_prob = old_log_prob.exp()
    # expm1 is exact near probability 1. Rounding may leave a log-probability above 0, which the clamp absorbs.
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
    config: ActorConfig | None,
    rollout_is_weights: torch.Tensor | None,
) -> LossOutput:
    config = require_config(config)
    log_ratio = bounded_log_ratio(old_log_prob, log_prob).detach()
    ratio, kept = log_ratio.exp(), inside.to(log_prob.dtype)
    per_token = -advantages * ratio.clamp(max=config.clip_ratio_c) * kept * log_prob
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    means = {
        "actor/pg_clipfrac": 1 - kept,
        "actor/pg_clipfrac_lower": (ratio > config.clip_ratio_c) * kept,
        "actor/ppo_kl": -log_ratio,
    }
    return loss, token_means(means, response_mask, config)
