"""The whole correction of a batch, and what it does in numbers."""

from __future__ import annotations

import torch

from verl.algorithms.rollout_correction.metrics import rejection_metrics, weight_metrics
from verl.algorithms.rollout_correction.rejection import keeps, statistic
from verl.algorithms.rollout_correction.weights import batch_norm_factor, bounded, raw_weights
from verl.config.rollout_correction import Correction


def apply_rollout_correction(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, float]]:
    """Weights, the mask of what is kept, and metrics of a whole batch. All arithmetic is in float64.

    Weights, their mean and the statistics of rejection are over the tokens of `response_mask`, rejected ones included:
    the two mechanisms do not know each other.

    Args:
        old_log_probs: of the trainer, [B, T] float.
        rollout_log_probs: of the engine that generated, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.

    Returns:
        weights [B, T] float32 without gradient, 0 where response_mask is 0, or None without rollout_is; the mask
        [B, T] in its dtype, 0 for what is rejected; `correction_metrics`.

    Raises:
        ValueError: the three shapes differ.
    """
    shapes = [tuple(x.shape) for x in (old_log_probs, rollout_log_probs, response_mask)]
    if len(set(shapes)) != 1:
        raise ValueError(f"old_log_probs, rollout_log_probs and response_mask have shapes {shapes}: give three of one")
    mask = response_mask.bool()
    columns = old_log_probs.double(), rollout_log_probs.double(), mask
    weights, metrics = None, {}
    if correction.rollout_is is not None:
        raw = raw_weights(*columns, correction.rollout_is)
        weights = bounded(raw, correction)
        if correction.rollout_is_batch_normalize:
            weights = weights / batch_norm_factor(weights, mask, correction.rollout_is)
        weights = weights.float()
        metrics |= weight_metrics(raw, mask, correction)
    kept = mask
    if correction.rejections:
        statistics = [(rejection, statistic(*columns, rejection)) for rejection in correction.rejections]
        for rejection, values in statistics:
            kept = kept & keeps(values, rejection)
        metrics |= rejection_metrics(statistics, kept, mask)
    named = {f"rollout_corr/{name}": value.item() for name, value in metrics.items()}
    return weights, kept.to(response_mask.dtype), named


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

    Raises:
        ValueError: the three shapes differ.
    """
    return apply_rollout_correction(log_probs, rollout_log_probs, response_mask, correction)[2]
