"""PPO's value loss for the critic: squared error, clipped as in PPO2 of openai/baselines (see arXiv:2005.12729)."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import agg_loss


def compute_value_loss(
    vpreds: torch.Tensor,
    returns: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    **denominators: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the clipped value loss; all tensors are [B, T].

    Per token: 0.5 max((v - R)^2, (clip(v, V - c, V + c) - R)^2).

    The larger of the two errors counts. A value that is closer to R than V was by more than c has no gradient. A value
    that moved away from R has a gradient, no matter how far it moved.

    Args:
        vpreds: v, the current values of the critic.
        returns: R, the target values.
        values: V, the values of the critic when the batch was made.
        response_mask: not 0 for a token that counts.
        cliprange_value: c, above 0.
        loss_agg_mode: see `agg_loss`.
        denominators: keywords of `agg_loss`, for the whole mini-batch.

    Returns:
        the loss, and the share of the tokens of the mini-batch whose clipped error is the larger one.
    """
    clipped = vpreds.clamp(values - cliprange_value, values + cliprange_value)
    error, clipped_error = (vpreds - returns).square(), (clipped - returns).square()
    loss = 0.5 * agg_loss(torch.maximum(error, clipped_error), response_mask, loss_agg_mode, **denominators)
    is_clipped = (clipped_error > error).to(vpreds.dtype).detach()
    return loss, agg_loss(is_clipped, response_mask, "token-mean", **denominators)
