"""Group Policy Gradient (GPG, arXiv:2504.02546): the plain policy gradient, without a ratio and without a clip."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import LossOutput, register_policy_loss, token_means, weighted_loss
from verl.config import ActorConfig


@register_policy_loss("gpg")
def compute_policy_loss_gpg(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the policy gradient loss; all tensors are [B, T].

    Per token: -A log_prob. `old_log_prob` is used for the metric only.

    Returns:
        the loss and `actor/ppo_kl`, the mean of old_log_prob - log_prob over the tokens of the mini-batch.
    """
    loss = weighted_loss(-advantages * log_prob, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, token_means({"actor/ppo_kl": old_log_prob - log_prob}, response_mask, config)
