"""What the policy losses share: the clip range, the ratio, importance weights, and sums over the mini-batch."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.aggregation import agg_loss
from verl.algorithms.kl import LOG_RATIO_BOUND


def required(config: Any) -> Any:
    """`config` itself.

    Raises:
        ValueError: it is None.
    """
    if config is None:
        raise ValueError("config=None: pass the actor section, it holds the loss's settings")
    return config


def clip_range(config: Any) -> tuple[float, float]:
    """`clip_ratio_low` and `clip_ratio_high` of the `actor` section, `clip_ratio` where one of them is None."""
    both = required(config).clip_ratio
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return both if low is None else low, both if high is None else high


def bounded_log_ratio(old_log_prob: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """log_prob - old_log_prob kept in +-20, against an overflow of its exponential."""
    return (log_prob - old_log_prob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's pessimistic bound max(-A r, -A clip(r, 1 - low, 1 + high)), and 1 where the clip binds, of each token."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).to(ratio.dtype)


def weighted_loss(
    per_token: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: torch.Tensor | None,
) -> torch.Tensor:
    """Aggregate a loss [B, T], each token's times its importance weight, with the mini-batch's denominators."""
    if rollout_is_weights is not None:
        per_token = per_token * rollout_is_weights.detach()
    return agg_loss(per_token, response_mask, loss_agg_mode, **denominators(config))


def token_means(values: dict[str, torch.Tensor], response_mask: torch.Tensor, config: Any) -> dict[str, torch.Tensor]:
    """Means over the mini-batch's tokens of values [B, T], without gradient."""
    return {
        name: agg_loss(value.detach(), response_mask, "token-mean", **denominators(config))
        for name, value in values.items()
    }


def denominators(config: Any) -> dict[str, float]:
    """`config.global_batch_info`; empty, which makes the given rows the whole mini-batch, where there is none."""
    return getattr(config, "global_batch_info", None) or {}
