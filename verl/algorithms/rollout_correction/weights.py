"""Importance weights pi/mu per token or per sequence: truncated (TIS), or 0 outside a band (IcePop)."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND, sequence_mean
from verl.config.rollout_correction import Correction
from verl.utils.torch_functional import masked_sum


def log_ratio(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return d = log pi - log mu, [B, T], without gradient.

    d is 0 where `mask` [B, T] is 0, because padding may hold -inf or NaN.
    """
    return (log_probs.detach() - rollout_log_probs.detach()).masked_fill(~mask.bool(), 0.0)


def importance_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> torch.Tensor | None:
    """Return the bounded weights pi/mu before the division by their mean; None if `correction.rollout_is` is None.

    w = exp(D), with D = d of the token, or the sum of d over the tokens of the sequence; D is clamped to +-20. Then:

    - truncated importance sampling: min(w, C) (E. L. Ionides, J. Comput. Graph. Stat. 17, 2008);
    - IcePop (arXiv:2510.18855): 0 if w is outside the band.

    Args:
        log_probs: log pi, [B, T] float.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.
        correction: the resolved settings.

    Returns:
        [B, T] in the dtype of the log-probabilities, without gradient, 0 where response_mask is 0.
    """
    if correction.rollout_is is None:
        return None
    return bounded_weights(raw_weights(log_probs, rollout_log_probs, response_mask, correction.rollout_is), correction)


def raw_weights(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, level: str
) -> torch.Tensor:
    """Return w = exp(D), [B, T], 0 where response_mask is 0; D is clamped to +-20, and w has no other bound.

    Args:
        log_probs: log pi, [B, T] float.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.
        level: `token` or `sequence`.
    """
    d = log_ratio(log_probs, rollout_log_probs, response_mask)
    if level == "sequence":
        d = masked_sum(d, response_mask, axis=-1).unsqueeze(-1).expand_as(d)
    return d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp().masked_fill(~response_mask.bool(), 0.0)


def bounded_weights(weights: torch.Tensor, correction: Correction) -> torch.Tensor:
    """Return the weights truncated to the upper bound of the band, or set to 0 outside the band."""
    band = correction.rollout_is_band
    if not correction.rollout_is_zero:
        return weights.clamp(max=band.hi)
    return weights.masked_fill((weights < band.lo) | (weights > band.hi), 0.0)


def batch_norm_factor(weights: torch.Tensor, response_mask: torch.Tensor, level: str) -> torch.Tensor:
    """Return the mean of bounded weights [B, T], a scalar.

    The mean is over tokens, or over sequences that have a token. It is 1 if all weights are 0.
    """
    mask = response_mask.bool()
    if level == "sequence":
        weights, mask = sequence_mean(weights, response_mask), mask.any(-1)
    mean = weights[mask].mean() if bool(mask.any()) else torch.zeros((), dtype=weights.dtype)
    return torch.where(mean > 1e-8, mean, torch.ones_like(mean))
