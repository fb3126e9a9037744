"""Soft Adaptive Policy Optimization (SAPO, arXiv:2511.20347): a smooth gate instead of a clip."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    bounded_log_ratio,
    register_policy_loss,
    require_config,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig


@register_policy_loss("sapo")
def compute_policy_loss_sapo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the SAPO loss; all tensors are [B, T].

    Per token: -A (4 / tau) sigmoid(tau (r - 1)), with tau = `config.tau_pos` for A > 0 and `config.tau_neg` otherwise.

    At r = 1 the gradient is the policy gradient. The larger tau is, the sooner a token loses its gradient as r moves
    away from 1.

    The aggregation is always `seq-mean-token-mean`; `loss_agg_mode` has no effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`; nothing is clipped, so the first two are 0; the
        third is the mean of old_log_prob - log_prob over the tokens of the mini-batch.
    """
    config = require_config(config)
    log_ratio = bounded_log_ratio(old_log_prob, log_prob)
    tau = torch.full_like(advantages, config.tau_neg).masked_fill(advantages > 0, config.tau_pos)
    gate = torch.sigmoid(tau * (log_ratio.exp() - 1)) * (4 / tau)
    loss = weighted_loss(-gate * advantages, response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    metrics = token_means({"actor/ppo_kl": -log_ratio}, response_mask, config)
    zero = loss.new_zeros(())
    return loss, {**metrics, "actor/pg_clipfrac": zero, "actor/pg_clipfrac_lower": zero}
