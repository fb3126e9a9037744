"""Masked statistics, log-probabilities and padding of tensors, under upstream verl's names.

A mask is not 0 for an element that counts; all other elements, including NaN, are ignored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Axis = int | tuple[int, ...] | None


def masked_sum(values: torch.Tensor, mask: torch.Tensor, axis: Axis = None) -> torch.Tensor:
    """Return the sum of `values` where `mask` is not 0, over `axis` or over all elements."""
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if axis is None else kept.sum(dim=axis)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, axis: Axis = None) -> torch.Tensor:
    """Return the mean of `values` where `mask` is not 0; 0 where nothing counts."""
    counts = mask.bool().expand_as(values)
    count = counts.sum() if axis is None else counts.sum(dim=axis)
    return masked_sum(values, counts, axis) / count.clamp(min=1)


def masked_var(values: torch.Tensor, mask: torch.Tensor, unbiased: bool = True) -> torch.Tensor:
    """Return the variance of all elements where `mask` is not 0.

    Args:
        values: float tensor.
        mask: broadcasts to `values`.
        unbiased: divide by n - 1 instead of n.

    Raises:
        ValueError: `unbiased` and fewer than two elements count.
    """
    variance = masked_mean((values - masked_mean(values, mask)).square(), mask)
    if not unbiased:
        return variance
    count = mask.bool().expand_as(values).sum()
    if count < 2:
        raise ValueError(f"masked_var: {int(count)} element(s) in the mask; the unbiased variance needs two")
    return variance * count / (count - 1)


def masked_whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Return (values - mean) / sqrt(var + 1e-8) with mean and unbiased variance over the mask.

    With `shift_mean=False` the mean is added again.

    Raises:
        ValueError: fewer than two elements count.
    """
    mean, variance = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def clip_by_value(x: torch.Tensor, tensor_min: torch.Tensor, tensor_max: torch.Tensor) -> torch.Tensor:
    """Return `x` between the two bounds, which may be tensors."""
    return torch.maximum(torch.minimum(x, tensor_max), tensor_min)


def gather_from_labels(data: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the element of the last dimension that each label selects: [..., V], [...] int64 -> [...]."""
    return data.gather(-1, label.unsqueeze(-1)).squeeze(-1)


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor, inplace_backward: bool = True) -> torch.Tensor:
    """Return the log-probability of each label: [..., V] float, [...] int64 -> [...].

    Args:
        logits: unnormalized log-probabilities.
        labels: token ids.
        inplace_backward: no effect on the result; upstream verl's kernel can reuse the memory of the logits.
    """
    del inplace_backward
    return gather_from_labels(logits, labels) - logits.logsumexp(dim=-1)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return the entropy of each distribution in nats: [..., V] float -> [...]."""
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def get_response_mask(
    response_id: torch.Tensor, eos_token: int | list[int] = 2, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    """Return 1 up to and including the first end-of-sequence token of each row, else 0: [B, T] -> [B, T] `dtype`."""
    stops = torch.isin(response_id, torch.as_tensor(eos_token, device=response_id.device)).int()
    return (stops.cumsum(dim=-1) - stops == 0).to(dtype)


def pad_sequence_to_length(
    tensors: torch.Tensor, max_seq_len: int, pad_token_id: float, left_pad: bool = False
) -> torch.Tensor:
    """Pad the last dimension to `max_seq_len`; a tensor that is long enough is returned unchanged."""
    missing = max_seq_len - tensors.shape[-1]
    if missing <= 0:
        return tensors
    return F.pad(tensors, (missing, 0) if left_pad else (0, missing), value=pad_token_id)


def pad_2d_list_to_length(response: list[list[int]], pad_token_id: int, max_length: int | None = None) -> torch.Tensor:
    """Return the rows as a tensor [B, T], padded on the right; T is the longest row, or `max_length` if larger."""
    width = max([max_length or 0, *(len(row) for row in response)])
    return torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in response])
