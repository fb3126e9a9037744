"""CISPO (MiniMax-M1, arXiv:2506.13585): the importance weight is clipped, so no token loses its gradient."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import bounded_log_ratio, clip_range, token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss


@register_policy_loss("cispo")
def compute_policy_loss_cispo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-sg(clip(r, 1 - low, 1 + high)) A log_prob of each token, sg being without gradient; all tensors [B, T].

    r = exp(log_prob - old_log_prob), the exponent kept in +-20; low and high are `config.clip_ratio_low` and
    `config.clip_ratio_high`. The paper has no lower bound: a `clip_ratio_low` of 1 or more.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the mini-batch's tokens: the share of
        tokens whose weight was clipped; 0, there is no dual clip; old_log_prob - log_prob.
    """
    low, high = clip_range(config)
    log_ratio = bounded_log_ratio(old_log_prob, log_prob).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - low, 1 + high)
    loss = weighted_loss(-weight * advantages * log_prob, response_mask, loss_agg_mode, config, rollout_is_weights)
    clipped = (ratio != weight).to(ratio.dtype)
    metrics = token_means({"actor/pg_clipfrac": clipped, "actor/ppo_kl": -log_ratio}, response_mask, config)
    return loss, {**metrics, "actor/pg_clipfrac_lower": loss.new_zeros(())}
