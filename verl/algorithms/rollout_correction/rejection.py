"""Which tokens and sequences are too far from the rollout's policy to learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from verl.algorithms.kl import LOG_RATIO_BOUND
from verl.algorithms.rollout_correction.pooling import POOLING, log_ratio
from verl.config.rollout_correction import Band, Rejection

_PROBABILITY_MARGIN = 1e-6


def rejection_mask(
    log_probs: torch.Tensor,
    rollout_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    rejections: Iterable[Rejection],
) -> torch.Tensor:
    """`response_mask` with 0 for what any of the terms rejects, in its dtype.

    Args:
        log_probs: log pi, [B, T] float.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token; sums, means and maxima are over these.
        rejections: all of them have to keep a token; none keep every one.
    """
    kept = response_mask.bool()
    for rejection in rejections:
        kept = kept & keeps(statistic(log_probs, rollout_log_probs, response_mask, rejection), rejection)
    return kept.to(response_mask.dtype)


def statistic(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, rejection: Rejection
) -> torch.Tensor:
    """What a term looks at, [B, T]; a sequence's value stands at each of its tokens, 0 where response_mask is 0.

    With d = log pi - log mu, of each token, or its sum, mean or maximum over a sequence (J. Schulman, "Approximating KL
    Divergence", 2020, joschu.net/blog/kl-approx.html):

    - k1: d, so that exp() of it is the ratio pi/mu, or a sequence's, or its geometric mean over tokens;
    - k2: d^2 / 2;
    - k3: exp(d) - 1 - d, d kept in +-20 in the exponent and out of it;
    - binary_kl: of "this token" against "another one", the larger of KL(pi || mu) and KL(mu || pi), probabilities kept
      1e-6 away from 0 and 1.
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
        values = POOLING[rejection.pooling](values, mask).unsqueeze(-1).expand_as(values)
    return values.masked_fill(~mask, 0.0)


def bounds(rejection: Rejection) -> Band:
    """The band of `statistic`'s values that are kept."""
    band = rejection.band
    if rejection.estimator == "k1":
        return Band(math.log(band.lo), math.log(band.hi))
    # Rounding may leave a divergence just below 0.
    return Band(-math.inf, band.hi)


def keeps(values: torch.Tensor, rejection: Rejection) -> torch.Tensor:
    """Where `statistic`'s values are within bounds, bool. A NaN is within none."""
    band = bounds(rejection)
    return (values >= band.lo) & (values <= band.hi)


def _binary_kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    p, q = (x.clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN) for x in (p, q))
    return torch.maximum(_one_way(p, q), _one_way(q, p))


def _one_way(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
