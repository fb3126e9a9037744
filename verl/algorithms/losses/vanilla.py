"""PPO's clipped policy loss (arXiv:1707.06347), with clip-higher (DAPO, arXiv:2503.14476) and dual clip
(arXiv:1912.09729)."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    bounded_log_ratio,
    clip_range,
    clipped_surrogate,
    register_policy_loss,
    require_config,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig


@register_policy_loss("vanilla")
def compute_policy_loss_vanilla(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute PPO's loss with the bounds of the `actor` section; all tensors are [B, T].

    Per token: max(-A r, -A clip(r, 1 - low, 1 + high)), and at most -A c for A < 0.

    Reads `clip_ratio`, `clip_ratio_low`, `clip_ratio_high` (None: `clip_ratio`), `clip_ratio_c` and, if present,
    `global_batch_info`.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the tokens of the mini-batch: the clip
        binds; the dual clip binds; old_log_prob - log_prob.
    """
    config = require_config(config)
    low, high = clip_range(config)
    per_token, clipped, clipped_lower, kl = clipped_policy_loss(
        old_log_prob, log_prob, advantages, clip_low=low, clip_high=high, clip_c=config.clip_ratio_c
    )
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    means = {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": clipped_lower, "actor/ppo_kl": kl}
    return loss, token_means(means, response_mask, config)


def clipped_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_c: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute PPO's loss per token, before masking.

    With r = exp(log_prob - old_log_prob), the exponent clamped to +-20:
    `max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))`, and at most `-A clip_c` for A < 0.

    Returns:
        loss, 1 where the clip binds, 1 where the dual clip binds, old_log_prob - log_prob (k1): four float tensors in
        the shape of the inputs.

    Raises:
        ValueError: `clip_c` is not above 1.
    """
    if clip_c <= 1.0:
        raise ValueError(f"clip_ratio_c={clip_c}: must be above 1; a usual value is 3")
    log_ratio = bounded_log_ratio(old_log_prob, log_prob)
    loss, clipped = clipped_surrogate(log_ratio.exp(), advantages, clip_low, clip_high)
    ceiling = -advantages * clip_c
    negative = advantages < 0
    clipped_lower = ((loss > ceiling) & negative).to(loss.dtype)
    return torch.where(negative, torch.minimum(loss, ceiling), loss), clipped, clipped_lower, -log_ratio
