"""Geometric-Mean Policy Optimization (GMPO, arXiv:2507.20673)."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND, agg_loss, sequence_mean
from verl.algorithms.losses.common import LossOutput, clip_range, denominators, register_policy_loss, token_means
from verl.config import ActorConfig

_SMALLEST_WEIGHT = 1e-10


@register_policy_loss("geo_mean")
def compute_policy_loss_geo_mean(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the GMPO loss; all tensors are [B, T].

    Per sequence: -A_i g_i, with g_i the geometric mean of the clipped ratios of its tokens. With
    d = log_prob - old_log_prob and s the sign of A, log g_i is the mean over the tokens of the sequence of
    `s min(s d, s clip(d, -low, high))`, at most 20 to prevent an overflow. A_i is the mean of the advantages of the
    sequence; in the paper they are equal. Importance weights enter as their geometric mean, with 1e-10 added to each.

    The bounds low and high are bounds of the log-ratio; the paper uses 0.4 for both.

    The aggregation is always the mean over the sequences of the mini-batch that have a token; `loss_agg_mode` has no
    effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the tokens of the mini-batch: outside
        the clip range with A > 0; outside with A < 0; old_log_prob - log_prob.
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
    means = {
        "actor/pg_clipfrac": (outside & (advantages > 0)).to(log_ratio.dtype),
        "actor/pg_clipfrac_lower": (outside & (advantages < 0)).to(log_ratio.dtype),
        "actor/ppo_kl": -log_ratio,
    }
    return loss, token_means(means, response_mask, config)
