"""Soft Adaptive Policy Optimization (arXiv:2511.20347): a smooth gate in the place of a clip."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import bounded_log_ratio, required, token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss


@register_policy_loss("sapo")
def compute_policy_loss_sapo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-A (4 / tau) sigmoid(tau (r - 1)) of each token, with r = exp(log_prob - old_log_prob); all tensors [B, T].

    tau is `config.tau_pos` where A > 0 and `config.tau_neg` elsewhere; the larger it is, the sooner a token that has
    moved away from r = 1 loses its gradient, which at r = 1 is the policy gradient's. The exponent is kept in +-20.

    The aggregation is always `seq-mean-token-mean`; `loss_agg_mode` has no effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`; nothing is clipped, so the first two are 0.
    """
    required(config)
    log_ratio = bounded_log_ratio(old_log_prob, log_prob)
    tau = torch.full_like(advantages, config.tau_neg).masked_fill(advantages > 0, config.tau_pos)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau)
    loss = weighted_loss(-gate * advantages, response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    metrics = token_means({"actor/ppo_kl": -log_ratio}, response_mask, config)
    zero = loss.new_zeros(())
    return loss, {**metrics, "actor/pg_clipfrac": zero, "actor/pg_clipfrac_lower": zero}
