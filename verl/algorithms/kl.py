"""Estimators of the KL divergence from log-probabilities of sampled tokens.

Source: J. Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND


def _k1(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio


def _k2(log_ratio: torch.Tensor) -> torch.Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: torch.Tensor) -> torch.Tensor:
    # The first clamp prevents an overflow of exp(). The second one keeps single tokens from dominating the batch.
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
    """Return an estimate of KL(policy || reference) per token, with d = logprob - ref_logprob.

    - `kl`, `k1`: d
    - `abs`: |d|
    - `mse`, `k2`: d^2 / 2
    - `low_var_kl`, `k3`: exp(-d) + d - 1, with d clamped to +-20 and the result clamped to +-10

    A name with a trailing `+` has the value of that estimator and the gradient of k2. The expectation of the k2
    gradient is the gradient of the KL divergence.

    Args:
        logprob: log-probabilities under the policy, any shape, float.
        ref_logprob: log-probabilities under the reference, same shape.
        kl_penalty: one of `KL_TYPES`.

    Returns:
        the estimate, in the shape and dtype of `logprob`.

    Raises:
        ValueError: unknown estimator, or `full`, which is not supported.
    """
    name = kl_penalty.removesuffix("+")
    if name == "full":
        raise ValueError("kl_penalty='full' is not supported: it needs the whole distribution; use 'low_var_kl'")
    if name not in _ESTIMATORS:
        raise ValueError(f"unknown kl_penalty={kl_penalty!r}: use one of {', '.join(KL_TYPES)}")
    log_ratio = logprob - ref_logprob
    value = _ESTIMATORS[name](log_ratio)
    if not kl_penalty.endswith("+"):
        return value
    surrogate = _k2(log_ratio)
    return value.detach() + (surrogate - surrogate.detach())
