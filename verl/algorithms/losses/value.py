"""The critic's loss of PPO: squared error, clipped as in openai/baselines' PPO2 (discussed in arXiv:2005.12729)."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.aggregation import agg_loss


def compute_value_loss(
    vpreds: torch.Tensor,
    returns: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    **denominators: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`0.5 max((v - R)^2, (clip(v, V - c, V + c) - R)^2)` of each token, aggregated; all tensors [B, T].

    With the larger of the two errors, a value that is more than c closer to R than V was has no gradient, and one that
    moved away from R, however far, is drawn back.

    Args:
        vpreds: v, the critic's values now.
        returns: R, what they should be.
        values: V, the critic's values when the batch was made.
        cliprange_value: c, above 0.
        denominators: of the whole mini-batch, see `agg_loss`.

    Returns:
        the loss, and the share of the mini-batch's tokens whose clipped error is the larger one.
    """
    clipped = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    error, clipped_error = (vpreds - returns).square(), (clipped - returns).square()
    loss = 0.5 * agg_loss(torch.maximum(error, clipped_error), response_mask, loss_agg_mode, **denominators)
    is_clipped = (clipped_error > error).to(vpreds.dtype).detach()
    return loss, agg_loss(is_clipped, response_mask, "token-mean", **denominators)
