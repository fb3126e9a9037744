"""Log-ratios of tokens, and one value of each sequence's tokens."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import masked_sum, sequence_mean


def log_ratio(log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """d = log pi - log mu [B, T], 0 where `mask` [B, T] is 0: padding may hold -inf or NaN. Carries no gradient."""
    return (log_probs.detach() - rollout_log_probs.detach()).masked_fill(~mask.bool(), 0.0)


def sequence_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens with `mask` not 0, [B, T] -> [B]; 0 of none."""
    return masked_sum(values, mask, dim=-1)


def sequence_max(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest of them; 0 of none."""
    empty = ~mask.bool().any(-1)
    # One more column, for a batch of width 0.
    values = torch.nn.functional.pad(values.masked_fill(~mask.bool(), float("-inf")), (0, 1), value=float("-inf"))
    return values.amax(-1).masked_fill(empty, 0.0)


POOLING = {"sum": sequence_sum, "mean": sequence_mean, "max": sequence_max}
