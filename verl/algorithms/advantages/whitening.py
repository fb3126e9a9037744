"""Advantages of mean 0 and deviation 1 over the tokens of a whole batch."""

from __future__ import annotations

import torch

_EPSILON = 1e-8


def whiten(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """`(v - mean) / sqrt(var + 1e-8)`, mean and unbiased variance over every token of the mask.

    One token has no deviation, and keeps its value. Equal values become 0.

    Args:
        values: [B, T]; what stands outside the mask, NaN included, is not read.
        response_mask: [B, T].

    Returns:
        [B, T] float64, 0 outside the mask.
    """
    live = response_mask.bool()
    values = torch.where(live, values.double(), 0.0)
    chosen = values[live]
    if chosen.numel() < 2:
        return values
    whitened = (values - chosen.mean()) * (chosen.var(correction=1) + _EPSILON).rsqrt()
    return torch.where(live, whitened, 0.0)
