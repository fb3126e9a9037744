"""Direct Reward Optimization (DRO, arXiv:2405.19107) per token: a policy gradient with a quadratic penalty."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    register_policy_loss,
    require_config,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig


@register_policy_loss("dro")
def compute_policy_loss_dro(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the DRO loss; all tensors are [B, T].

    Per token: -A log_prob + (beta / 2) (log_prob - old_log_prob)^2, with beta = `config.policy_loss.dro_beta`.

    This is the policy objective of the paper per token, with two replacements: the advantage replaces the reward minus
    the learned value, and the sampling policy is the reference. Tokens with A = 0 keep the penalty.

    Returns:
        the loss and `actor/ppo_kl`, the mean of old_log_prob - log_prob over the tokens of the mini-batch.

    Raises:
        ValueError: `dro_beta` is None or not above 0.
    """
    beta = require_config(config).policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(
            f"actor_rollout_ref.actor.policy_loss.dro_beta={beta}: loss_mode=dro needs a number above 0, e.g. 0.05"
        )
    log_ratio = log_prob - old_log_prob
    per_token = -advantages * log_prob + 0.5 * beta * log_ratio.square()
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, token_means({"actor/ppo_kl": -log_ratio}, response_mask, config)
