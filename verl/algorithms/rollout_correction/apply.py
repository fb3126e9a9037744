"""Rollout correction of a whole batch: weights, the mask of kept tokens, and metrics."""

from __future__ import annotations

import torch

from verl.algorithms.rollout_correction.metrics import rejection_metrics, weight_metrics
from verl.algorithms.rollout_correction.rejection import statistic, within_bounds
from verl.algorithms.rollout_correction.weights import batch_norm_factor, bounded_weights, raw_weights
from verl.config.rollout_correction import Correction


def apply_rollout_correction(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, float]]:
    """Return the weights, the mask of kept tokens, and the metrics of a whole batch. The arithmetic is float64.

    Weights, their mean and the statistics of rejection use all tokens of `response_mask`, including rejected ones: the
    two mechanisms are independent.

    Args:
        old_log_probs: log pi, [B, T] float, from the trainer.
        rollout_log_probs: log mu, [B, T] float, from the rollout engine.
        response_mask: [B, T], not 0 for a generated token.
        correction: the resolved settings.

    Returns:
        weights [B, T] float32 without gradient, 0 where response_mask is 0, or None without rollout_is; the mask [B, T]
        in its own dtype, 0 for rejected tokens; `correction_metrics`.

    Raises:
        ValueError: the three shapes differ.
    """
    shapes = [tuple(x.shape) for x in (old_log_probs, rollout_log_probs, response_mask)]
    if len(set(shapes)) != 1:
        raise ValueError(
            f"old_log_probs, rollout_log_probs and response_mask have shapes {shapes}: they must be equal, [B, T]"
        )
    mask = response_mask.bool()
    columns = old_log_probs.double(), rollout_log_probs.double(), mask
    weights: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] = {}
    if correction.rollout_is is not None:
        raw = raw_weights(*columns, correction.rollout_is)
        weights = bounded_weights(raw, correction)
        if correction.rollout_is_batch_normalize:
            weights = weights / batch_norm_factor(weights, mask, correction.rollout_is)
        weights = weights.float()
        metrics |= weight_metrics(raw, mask, correction)
    kept = mask
    if correction.rejections:
        statistics = [(rejection, statistic(*columns, rejection)) for rejection in correction.rejections]
        for rejection, values in statistics:
            kept = kept & within_bounds(values, rejection)
        metrics |= rejection_metrics(statistics, kept, mask)
    named = {f"rollout_corr/{name}": value.item() for name, value in metrics.items()}
    return weights, kept.to(response_mask.dtype), named


def correction_metrics(
    log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> dict[str, float]:
    """Return the metrics of a correction on a batch, in any mode; empty if it neither weights nor rejects.

    Means, extremes and shares are over the tokens with response_mask 1, and over the sequences that have such a token.
    A mean, maximum, minimum or share over nothing is 0.

    With rollout_is, for the bounded weights before they are divided by their mean:

    - rollout_corr/rollout_is_{mean,std}: over tokens, population std;
    - rollout_corr/rollout_is_{max,min}: over tokens; for `sequence`: of exp(sum d), whose exponent is clamped to +-20;
    - rollout_corr/rollout_is_eff_sample_size: mean(w)^2 / mean(w^2) over tokens, in 0..1 (A. Kong, 1992);
    - rollout_corr/rollout_is_ratio_fraction_{high,low}: share of tokens, or of sequences, beyond the bounds;
    - rollout_corr/rollout_is_seq_{mean,std,max,min,max_deviation}: of the mean weight of each sequence, unbiased std,
      deviation from 1;
    - rollout_corr/rollout_is_seq_fraction_{high,low}: share of sequences whose mean of unbounded weights is beyond the
      bounds;
    - rollout_corr/rollout_is_oob_ratio: with a band, share of tokens whose weight becomes 0;
    - rollout_corr/rollout_is_batch_norm_factor: with rollout_is_batch_normalize, the divisor of the weights.

    With rollout_rs, for each TERM and its statistic (`rejection.statistic`; for k1 it is d):

    - rollout_corr/rollout_rs_TERM_{mean,std}: over tokens; population std of the values clamped to the bounds;
    - rollout_corr/rollout_rs_TERM_{max,min,fraction_high,fraction_low}: over tokens; over sequences for seq_*;
    - rollout_corr/rollout_rs_TERM_seq_{mean,std,max,min,max_deviation,fraction_high,fraction_low}: over sequences, of
      the value, or of its mean for a term per token; unbiased std, deviation from 0;
    - rollout_corr/rollout_rs_TERM_{masked_fraction,seq_masked_fraction}: share of rejected tokens, and of sequences
      that lose at least one token;
    - rollout_corr/rollout_rs_{masked_fraction,seq_masked_fraction}: the same for all terms together.

    Args:
        log_probs: log pi, [B, T] float: old_log_probs, or the log-probabilities that training computed.
        rollout_log_probs: log mu, [B, T] float.
        response_mask: [B, T], not 0 for a generated token; before any rejection.
        correction: the resolved settings.

    Raises:
        ValueError: the three shapes differ.
    """
    return apply_rollout_correction(log_probs, rollout_log_probs, response_mask, correction)[2]
