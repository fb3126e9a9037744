"""CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, so every token keeps its gradient."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    bounded_log_ratio,
    clip_range,
    register_policy_loss,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig


@register_policy_loss("cispo")
def compute_policy_loss_cispo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the CISPO loss; all tensors are [B, T].

    Per token: -sg(clip(r, 1 - low, 1 + high)) A log_prob.

    The paper has no lower bound: this is a `clip_ratio_low` of 1 or more.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the tokens of the mini-batch: the
        weight is clipped; 0, since there is no dual clip; old_log_prob - log_prob.
    """
    low, high = clip_range(config)
    log_ratio = bounded_log_ratio(old_log_prob, log_prob).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - low, 1 + high)
    loss = weighted_loss(-weight * advantages * log_prob, response_mask, loss_agg_mode, config, rollout_is_weights)
    clipped = (ratio != weight).to(ratio.dtype)
    metrics = token_means({"actor/pg_clipfrac": clipped, "actor/ppo_kl": -log_ratio}, response_mask, config)
    return loss, {**metrics, "actor/pg_clipfrac_lower": loss.new_zeros(())}
