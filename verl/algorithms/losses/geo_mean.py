"""Geometric-Mean Policy Optimization (GMPO, arXiv:2507.20673)."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.aggregation import agg_loss, sequence_mean
from verl.algorithms.kl import LOG_RATIO_BOUND
from verl.algorithms.losses.common import clip_range, denominators, token_means
from verl.algorithms.losses.registry import register_policy_loss

_SMALLEST_WEIGHT = 1e-10


@register_policy_loss("geo_mean")
def compute_policy_loss_geo_mean(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-A_i g_i of each sequence, g_i being the geometric mean of its tokens' clipped ratios; all tensors [B, T].

    With d = log_prob - old_log_prob and s the sign of A, log g_i is the mean over the sequence's tokens of
    `s min(s d, s clip(d, -low, high))`, kept below 20 against an overflow. The clip range (`config.clip_ratio_low`,
    `config.clip_ratio_high`) bounds log-ratios, and the paper's is 0.4 on either side. A_i is the mean of the
    sequence's advantages, which the paper has equal. Importance weights enter as their geometric mean, each at least
    1e-10.

    The aggregation is always the mean over the mini-batch's sequences that have a token; `loss_agg_mode` has no effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the mini-batch's tokens: outside the
        clip range and A > 0; outside and A < 0; old_log_prob - log_prob.
    """
    low, high = clip_range(config)
    log_ratio = log_prob - old_log_prob
    clamped = log_ratio.clamp(-low, high)
    sign = advantages.sign()
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * clamped)
    log_weight = sequence_mean(pessimistic, response_mask).clamp(max=LOG_RATIO_BOUND)
    per_sequence = -sequence_mean(advantages, response_mask) * log_weight.exp()
    if rollout_is_weights is not None:
        log_weights = (rollout_is_weights.detach() + _SMALLEST_WEIGHT).log()
        per_sequence = per_sequence * sequence_mean(log_weights, response_mask).exp()
    has_tokens = response_mask.bool().any(dim=-1, keepdim=True)
    loss = agg_loss(per_sequence.unsqueeze(-1), has_tokens, "seq-mean-token-sum", **denominators(config))
    outside = log_ratio != clamped
    shares = {
        "actor/pg_clipfrac": (outside & (advantages > 0)).to(log_ratio.dtype),
        "actor/pg_clipfrac_lower": (outside & (advantages < 0)).to(log_ratio.dtype),
        "actor/ppo_kl": -log_ratio,
    }
    return loss, token_means(shares, response_mask, config)
