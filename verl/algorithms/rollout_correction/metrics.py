"""Metrics of weights and rejection over a whole batch; all sums are float64. `apply.correction_metrics` lists them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.rollout_correction.rejection import bounds, within_bounds
from verl.algorithms.rollout_correction.weights import batch_norm_factor, bounded_weights
from verl.config.rollout_correction import Correction, Rejection


def weight_metrics(raw: torch.Tensor, mask: torch.Tensor, correction: Correction) -> dict[str, torch.Tensor]:
    """Return the metrics of rollout_is; their names lack the prefix `rollout_corr/`.

    Args:
        raw: `weights.raw_weights`, [B, T].
        mask: [B, T] bool.
        correction: its `rollout_is` must not be None.
    """
    level, band = correction.rollout_is, correction.rollout_is_band
    assert level is not None
    weights, rows = bounded_weights(raw, correction), mask.any(-1)
    tokens, raw_tokens = weights[mask], raw[mask]
    sequences, raw_sequences = (sequence_mean(x, mask)[rows] for x in (weights, raw))
    # All tokens of a sequence have the same weight: one value per sequence.
    compared = raw_sequences if level == "sequence" else raw_tokens
    extremes = raw_sequences if level == "sequence" else tokens
    mean, square = _mean(tokens), _mean(tokens.square())
    metrics = {
        "rollout_is_mean": mean,
        "rollout_is_std": _std(tokens),
        "rollout_is_max": _max(extremes),
        "rollout_is_min": _min(extremes),
        "rollout_is_eff_sample_size": torch.where(square > 0, mean.square() / square, torch.zeros_like(square)),
        "rollout_is_ratio_fraction_high": _mean((compared > band.hi).double()),
        "rollout_is_ratio_fraction_low": _mean((compared < band.lo).double()),
        **_summary("rollout_is_seq", sequences, ideal=1.0),
        "rollout_is_seq_fraction_high": _mean((raw_sequences > band.hi).double()),
        "rollout_is_seq_fraction_low": _mean((raw_sequences < band.lo).double()),
    }
    if correction.rollout_is_zero:
        metrics["rollout_is_oob_ratio"] = _mean(((raw_tokens < band.lo) | (raw_tokens > band.hi)).double())
    if correction.rollout_is_batch_normalize:
        metrics["rollout_is_batch_norm_factor"] = batch_norm_factor(weights, mask, level)
    return metrics


def rejection_metrics(
    statistics: Sequence[tuple[Rejection, torch.Tensor]], kept: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the metrics of rollout_rs, by name without `rollout_corr/`.

    Args:
        statistics: each term with its `rejection.statistic` [B, T]; at least one.
        kept: [B, T] bool, the tokens that all terms keep.
        mask: [B, T] bool.
    """
    metrics = _masked_fractions("rollout_rs", kept, mask)
    for rejection, values in statistics:
        prefix = f"rollout_rs_{rejection.term}"
        metrics |= {f"{prefix}_{name}": value for name, value in _term_metrics(values, mask, rejection).items()}
        metrics |= _masked_fractions(prefix, within_bounds(values, rejection), mask)
    return metrics


def _term_metrics(values: torch.Tensor, mask: torch.Tensor, rejection: Rejection) -> dict[str, torch.Tensor]:
    band = bounds(rejection)
    tokens, sequences = values[mask], sequence_mean(values, mask)[mask.any(-1)]
    compared = tokens if rejection.pooling is None else sequences
    return {
        "mean": _mean(tokens),
        "std": _std(tokens.clamp(band.lo, band.hi)),
        "max": _max(compared),
        "min": _min(compared),
        "fraction_high": _mean((compared > band.hi).double()),
        "fraction_low": _mean((compared < band.lo).double()),
        **_summary("seq", sequences, ideal=0.0),
        "seq_fraction_high": _mean((sequences > band.hi).double()),
        "seq_fraction_low": _mean((sequences < band.lo).double()),
    }


def _masked_fractions(prefix: str, kept: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    rejected = ~kept & mask
    return {
        f"{prefix}_masked_fraction": _mean(rejected[mask].double()),
        f"{prefix}_seq_masked_fraction": _mean(rejected.any(-1)[mask.any(-1)].double()),
    }


def _summary(prefix: str, values: torch.Tensor, ideal: float) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}_mean": _mean(values),
        f"{prefix}_std": values.std() if values.numel() > 1 else _ZERO,
        f"{prefix}_max": _max(values),
        f"{prefix}_min": _min(values),
        f"{prefix}_max_deviation": _max((values - ideal).abs()),
    }


_ZERO = torch.zeros((), dtype=torch.float64)


def _mean(values: torch.Tensor) -> torch.Tensor:
    return values.mean() if values.numel() else _ZERO


def _std(values: torch.Tensor) -> torch.Tensor:
    return values.std(correction=0) if values.numel() else _ZERO


def _max(values: torch.Tensor) -> torch.Tensor:
    return values.max() if values.numel() else _ZERO


def _min(values: torch.Tensor) -> torch.Tensor:
    return values.min() if values.numel() else _ZERO
