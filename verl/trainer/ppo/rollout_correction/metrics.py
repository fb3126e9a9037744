"""Numbers of weights and rejection, from a whole batch; every sum runs in float64."""

from __future__ import annotations

import torch

from verl.trainer.config.rollout_correction import Correction, Rejection
from verl.trainer.ppo.losses.kl import LOG_RATIO_BOUND
from verl.trainer.ppo.rollout_correction.pooling import log_ratio, sequence_mean, sequence_sum
from verl.trainer.ppo.rollout_correction.rejection import bounds, keeps, statistic
from verl.trainer.ppo.rollout_correction.weights import batch_norm_factor, bounded, raw_weights


def correction_metrics(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> dict[str, float]:
    """What `correction` does to a batch, whatever the mode; nothing where it neither weights nor rejects.

    Means, extremes and shares are over the tokens with response_mask 1 and over the sequences that have one; a mean,
    maximum, minimum or share of nothing is 0.

    With rollout_is, of the bounded weights before they are divided by their mean:

    - rollout_corr/rollout_is_{mean,std}: over tokens, std of the population;
    - rollout_corr/rollout_is_{max,min}: over tokens; for `sequence` of exp(sum d) before any bound but that of +-20;
    - rollout_corr/rollout_is_eff_sample_size: mean(w)^2 / mean(w^2) over tokens, in 0..1 (A. Kong, 1992);
    - rollout_corr/rollout_is_ratio_fraction_{high,low}: share of tokens, or of sequences, that lie beyond the bounds;
    - rollout_corr/rollout_is_seq_{mean,std,max,min,max_deviation}: of each sequence's mean weight, std unbiased,
      deviation from 1;
    - rollout_corr/rollout_is_seq_fraction_{high,low}: share of sequences whose mean of unbounded weights is;
    - rollout_corr/rollout_is_oob_ratio: with a band, share of tokens whose weight becomes 0;
    - rollout_corr/rollout_is_batch_norm_factor: what the weights are divided by, if they are.

    With rollout_rs, for each TERM and the statistic it looks at (`rejection.statistic`; k1 is d):

    - rollout_corr/rollout_rs_TERM_{mean,std}: over tokens, std of the population and of values cut to the bounds;
    - rollout_corr/rollout_rs_TERM_{max,min,fraction_high,fraction_low}: over tokens, or over sequences for seq_*;
    - rollout_corr/rollout_rs_TERM_seq_{mean,std,max,min,max_deviation,fraction_high,fraction_low}: over sequences, of
      the value or, for a term on tokens, its mean; std unbiased, deviation from 0;
    - rollout_corr/rollout_rs_TERM_{masked_fraction,seq_masked_fraction}: share of tokens that are rejected, and of
      sequences that lose at least one;
    - rollout_corr/rollout_rs_{masked_fraction,seq_masked_fraction}: by all terms together.

    Args:
        log_probs: log pi, [B, T] float: old_log_probs, or what the trainer saw.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token; before any rejection.
    """
    columns = log_probs.double(), rollout_log_probs.double(), response_mask.bool()
    values = {**_weight_metrics(*columns, correction), **_rejection_metrics(*columns, correction)}
    return {f"rollout_corr/{name}": value.item() for name, value in values.items()}


def _weight_metrics(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, correction: Correction
) -> dict[str, torch.Tensor]:
    level, band = correction.rollout_is, correction.rollout_is_band
    if level is None:
        return {}
    raw = raw_weights(log_probs, rollout_log_probs, mask, level)
    weights, rows = bounded(raw, correction), mask.any(-1)
    tokens, of_tokens = weights[mask], raw[mask]
    sequences, of_sequences = (sequence_mean(x, mask)[rows] for x in (weights, raw))
    # One value a sequence: its tokens all have the same.
    judged = of_sequences if level == "sequence" else of_tokens
    if level == "sequence":
        extremes = (
            sequence_sum(log_ratio(log_probs, rollout_log_probs, mask), mask)[rows]
            .clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
            .exp()
        )
    else:
        extremes = tokens
    mean, square = _mean(tokens), _mean(tokens.square())
    metrics = {
        "rollout_is_mean": mean,
        "rollout_is_std": _std(tokens),
        "rollout_is_max": _max(extremes),
        "rollout_is_min": _min(extremes),
        "rollout_is_eff_sample_size": torch.where(square > 0, mean.square() / square, torch.zeros_like(square)),
        "rollout_is_ratio_fraction_high": _mean((judged > band.hi).double()),
        "rollout_is_ratio_fraction_low": _mean((judged < band.lo).double()),
        **_summary("rollout_is_seq", sequences, ideal=1.0),
        "rollout_is_seq_fraction_high": _mean((of_sequences > band.hi).double()),
        "rollout_is_seq_fraction_low": _mean((of_sequences < band.lo).double()),
    }
    if correction.rollout_is_zero:
        metrics["rollout_is_oob_ratio"] = _mean(((of_tokens < band.lo) | (of_tokens > band.hi)).double())
    if correction.rollout_is_batch_normalize:
        metrics["rollout_is_batch_norm_factor"] = batch_norm_factor(weights, mask, level)
    return metrics


def _rejection_metrics(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor, correction: Correction
) -> dict[str, torch.Tensor]:
    metrics: dict[str, torch.Tensor] = {}
    kept = mask
    for rejection in correction.rejections:
        values = statistic(log_probs, rollout_log_probs, mask, rejection)
        keep = keeps(values, rejection)
        kept = kept & keep
        prefix = f"rollout_rs_{rejection.term}"
        metrics |= {f"{prefix}_{name}": value for name, value in _term_metrics(values, mask, rejection).items()}
        metrics |= _masked_fractions(prefix, keep, mask)
    return metrics | (_masked_fractions("rollout_rs", kept, mask) if correction.rejections else {})


def _term_metrics(values: torch.Tensor, mask: torch.Tensor, rejection: Rejection) -> dict[str, torch.Tensor]:
    band = bounds(rejection)
    tokens, sequences = values[mask], sequence_mean(values, mask)[mask.any(-1)]
    own = tokens if rejection.pooling is None else sequences
    return {
        "mean": _mean(tokens),
        "std": _std(tokens.clamp(band.lo, band.hi)),
        "max": _max(own),
        "min": _min(own),
        "fraction_high": _mean((own > band.hi).double()),
        "fraction_low": _mean((own < band.lo).double()),
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
