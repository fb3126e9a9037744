"""Means of values per token over sequences, and the aggregation of a loss per token to one number.

The aggregation is additive: the results of the micro-batches of a mini-batch add up to the result of the mini-batch.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from verl.utils.torch_functional import masked_sum

LOSS_AGG_MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)

# Log-ratios are clamped to +-20 before exp(), which would overflow. Beyond that the two policies are simply far apart.
LOG_RATIO_BOUND = 20.0


class LossDenominators(TypedDict):
    """Counts of a whole mini-batch over all ranks, by which `agg_loss` divides; the names are upstream verl's.

    Attributes:
        dp_size: 1, because losses are added up over the ranks.
        batch_num_tokens: response tokens.
        global_batch_size: sequences with at least one response token.
        loss_scale_factor: divisor of `seq-mean-token-sum-norm`, in tokens.
    """

    dp_size: int
    batch_num_tokens: float
    global_batch_size: float
    loss_scale_factor: float


def sequence_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the tokens of each sequence, [B, T] -> [B]; 0 for a sequence without a token."""
    return masked_sum(values, mask, axis=-1) / mask.bool().sum(dim=-1).clamp(min=1)


def agg_loss(
    loss_mat: torch.Tensor,
    loss_mask: torch.Tensor,
    loss_agg_mode: str,
    dp_size: float = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> torch.Tensor:
    """Aggregate a loss [B, T] over the tokens where `loss_mask` [B, T] is not 0.

    - `token-mean`: sum over all tokens / number of tokens
    - `token-sum`: sum over all tokens
    - `seq-mean-token-sum`: mean over sequences of the sum over their tokens
    - `seq-mean-token-sum-norm`: the same / `loss_scale_factor`
    - `seq-mean-token-mean`: mean over sequences of the mean over their tokens

    Sequences without a token are not counted. When `loss_mat` is one part of a mini-batch, pass the denominators of
    the whole mini-batch: the results of the parts then add up to the result of the whole.

    Args:
        loss_mat: [B, T] float.
        loss_mask: [B, T], not 0 for a token that counts.
        loss_agg_mode: one of `LOSS_AGG_MODES`.
        dp_size: factor of the result. Here losses are added up over ranks, so it is 1; upstream verl averages over this
            many ranks.
        batch_num_tokens: number of tokens in the whole mini-batch; default: the tokens of `loss_mask`.
        global_batch_size: number of sequences with a token in the whole mini-batch; default: those of `loss_mask`.
        loss_scale_factor: divisor of `seq-mean-token-sum-norm`, in tokens; default: the padded width T.

    Returns:
        a scalar; 0 if no token counts.

    Raises:
        ValueError: unknown mode.
    """
    if loss_agg_mode not in LOSS_AGG_MODES:
        raise ValueError(f"unknown loss_agg_mode={loss_agg_mode!r}: use one of {', '.join(LOSS_AGG_MODES)}")
    if loss_agg_mode == "token-sum":
        return dp_size * masked_sum(loss_mat, loss_mask)
    tokens_per_sequence = loss_mask.bool().sum(dim=-1)
    if loss_agg_mode == "token-mean":
        tokens = tokens_per_sequence.sum() if batch_num_tokens is None else batch_num_tokens
        return dp_size * masked_sum(loss_mat, loss_mask) / _at_least_one(tokens)
    per_sequence = masked_sum(loss_mat, loss_mask, axis=-1)
    if loss_agg_mode == "seq-mean-token-mean":
        per_sequence = per_sequence / tokens_per_sequence.clamp(min=1)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / (loss_mat.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    sequences = (tokens_per_sequence > 0).sum() if global_batch_size is None else global_batch_size
    return dp_size * per_sequence.sum() / _at_least_one(sequences)


def _at_least_one(count: torch.Tensor | float) -> torch.Tensor | float:
    """Return `count`, or 1 for 0, so that a batch without a token has loss 0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
