"""Rejection of tokens and sequences whose probabilities under pi and mu are too far apart."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND, sequence_mean
from verl.algorithms.rollout_correction.weights import log_ratio
from verl.config.rollout_correction import Band, Rejection
from verl.utils.torch_functional import masked_sum

_PROBABILITY_MARGIN = 1e-6


def rejection_mask(
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    rejections: Iterable[Rejection],
) -> torch.Tensor:
    """Return `response_mask` with 0 for each token that a term rejects, in the same dtype.

    Args:
        log_probs: log pi, [B, T] float.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token; sums, means and maxima are over these tokens.
        rejections: a token is kept if all terms keep it; without terms every token is kept.
    """
    kept = response_mask.bool()
    for rejection in rejections:
        kept = kept & within_bounds(statistic(log_probs, rollout_log_probs, response_mask, rejection), rejection)
    return kept.to(response_mask.dtype)


def statistic(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, rejection: Rejection
) -> torch.Tensor:
    """Return the value that a term compares with its bounds, [B, T]; 0 where response_mask is 0.

    It is the value of each token, or the sum, mean or maximum over the sequence, repeated at each of its tokens. With
    d = log pi - log mu (J. Schulman, "Approximating KL Divergence", 2020, joschu.net/blog/kl-approx.html):

    - k1: d; exp(d) is the ratio pi/mu of a token, of a sequence (sum), or its geometric mean over tokens (mean);
    - k2: d^2 / 2;
    - k3: exp(d) - 1 - d, with d clamped to +-20 in both places;
    - binary_kl: max(KL(pi || mu), KL(mu || pi)) of "this token" against "any other token", with probabilities clamped
      to 1e-6 .. 1 - 1e-6.
    """
    mask = response_mask.bool()
    d = log_ratio(log_probs, rollout_log_probs, mask)
    if rejection.estimator == "k1":
        values = d
    elif rejection.estimator == "k2":
        values = 0.5 * d.square()
    elif rejection.estimator == "k3":
        d = d.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
        values = d.expm1() - d
    else:
        values = _binary_kl(*(x.detach().masked_fill(~mask, 0.0).exp() for x in (log_probs, rollout_log_probs)))
    if rejection.pooling is not None:
        values = _pool(values, mask, rejection.pooling).unsqueeze(-1).expand_as(values)
    return values.masked_fill(~mask, 0.0)


def bounds(rejection: Rejection) -> Band:
    """Return the band in which a value of `statistic` is kept."""
    band = rejection.band
    if rejection.estimator == "k1":
        return Band(math.log(band.lo), math.log(band.hi))
    # A divergence has no lower bound here, because rounding may leave it just below 0.
    return Band(-math.inf, band.hi)


def within_bounds(values: torch.Tensor, rejection: Rejection) -> torch.Tensor:
    """Return True where a value of `statistic` is kept, [B, T] bool; NaN is rejected."""
    band = bounds(rejection)
    return (values >= band.lo) & (values <= band.hi)


def _pool(values: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the sum, mean or max over the tokens of each sequence, [B, T] -> [B]; 0 for a sequence without a token."""
    if pooling == "sum":
        return masked_sum(values, mask, axis=-1)
    if pooling == "mean":
        return sequence_mean(values, mask)
    values = values.masked_fill(~mask, float("-inf"))
    # One more column, because amax() fails on a batch of width 0.
    values = torch.nn.functional.pad(values, (0, 1), value=float("-inf"))
    return values.amax(-1).masked_fill(~mask.any(-1), 0.0)


def _binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = (x.clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN) for x in (p, q))
    return torch.maximum(_one_way_kl(p, q), _one_way_kl(q, p))


def _one_way_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
