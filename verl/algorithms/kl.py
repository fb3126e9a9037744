"""Estimators of the KL divergence from log-probabilities of sampled tokens (http://joschu.net/blog/kl-approx.html)."""

from __future__ import annotations

from collections.abc import Callable

import torch

# exp() of a log-ratio is limited to exp(+-20): beyond it the number only says "far apart".
LOG_RATIO_BOUND = 20.0


def _k1(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio


def _k2(log_ratio: torch.Tensor) -> torch.Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    # the exponent is bounded against overflow, the result against single tokens that would rule the batch
    negative = (-log_ratio).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return (negative.exp() - negative - 1).clamp(-10.0, 10.0)


_ESTIMATORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "kl": _k1,
    "k1": _k1,
    "abs": torch.abs,
    "mse": _k2,
    "k2": _k2,
    "low_var_kl": _k3,
    "k3": _k3,
}
KL_TYPES = (*_ESTIMATORS, *(f"{name}+" for name in _ESTIMATORS))


def kl_penalty(logprob: torch.Tensor, ref_logprob: torch.Tensor, kl_penalty: str) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference), any shape, with d = logprob - ref_logprob.

    `kl` (k1): d; `abs`: |d|; `mse` (k2): d^2 / 2; `low_var_kl` (k3): exp(-d) + d - 1 with d kept in +-20 and the result
    in +-10. With a `+` behind the name the value is that estimator's and the gradient that of k2, whose expectation is
    the gradient of the KL divergence.

    Raises:
        ValueError: an unknown estimator.
    """
    name = kl_penalty.removesuffix("+")
    if name == "full":
        raise ValueError("kl_penalty='full' is not supported: it needs the whole distribution; use 'low_var_kl'")
    if name not in _ESTIMATORS:
        raise ValueError(f"kl_penalty={kl_penalty!r} is unknown: use one of {', '.join(KL_TYPES)}")
    log_ratio = logprob - ref_logprob
    value = _ESTIMATORS[name](log_ratio)
    if not kl_penalty.endswith("+"):
        return value
    surrogate = _k2(log_ratio)
    return value.detach() + (surrogate - surrogate.detach())
