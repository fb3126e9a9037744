"""Importance weights of a token or of a whole sequence, cut (TIS) or with everything outside a band at 0 (IcePop)."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.kl import LOG_RATIO_BOUND
from verl.algorithms.rollout_correction.pooling import log_ratio, sequence_sum
from verl.config.rollout_correction import Correction


def importance_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> torch.Tensor | None:
    """Bounded weights pi/mu, not yet divided by their mean; None where `correction.rollout_is` is None.

    With D = d of the token, or the sum of d over the sequence's tokens: w = exp(D), D kept in +-20, then
    min(w, C) (truncated importance sampling: E. L. Ionides, J. Comput. Graph. Stat. 17, 2008), or 0 where w is outside
    the band (IcePop: arXiv:2510.18855).

    Args:
        log_probs: log pi, [B, T] float.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.

    Returns:
        [B, T] in the log-probabilities' dtype, without gradient, 0 where response_mask is 0.
    """
    if correction.rollout_is is None:
        return None
    return bounded(raw_weights(log_probs, rollout_log_probs, response_mask, correction.rollout_is), correction)


def raw_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, level: str
) -> torch.Tensor:
    """w before any bound but that of D, [B, T], 0 where response_mask is 0; `level` is token or sequence."""
    d = log_ratio(log_probs, rollout_log_probs, response_mask)
    if level == "sequence":
        d = sequence_sum(d, response_mask).unsqueeze(-1).expand_as(d)
    return d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().masked_fill(~response_mask.bool(), 0.0)


def bounded(weights: torch.Tensor, correction: Correction) -> torch.Tensor:
    """`weights` within the band: cut at its upper bound, or 0 outside."""
    band = correction.rollout_is_band
    if not correction.rollout_is_zero:
        return weights.clamp(max=band.hi)
    return weights.masked_fill((weights < band.lo) | (weights > band.hi), 0.0)


def batch_norm_factor(weights: torch.Tensor, response_mask: torch.Tensor, level: str) -> torch.Tensor:
    """Mean of bounded weights [B, T]: over tokens, or over sequences that have one; 1 where every weight is 0."""
    kept = response_mask.bool()
    if level == "sequence":
        weights, kept = sequence_mean(weights, response_mask), kept.any(-1)
    mean = weights[kept].mean() if bool(kept.any()) else torch.zeros((), dtype=weights.dtype)
    return torch.where(mean > 1e-8, mean, torch.ones_like(mean))
