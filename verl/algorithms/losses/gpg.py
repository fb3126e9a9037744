"""Group Policy Gradient (arXiv:2504.02546): the plain policy gradient, without a ratio and without a clip."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss


@register_policy_loss("gpg")
def compute_policy_loss_gpg(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-A log_prob of each token; all tensors [B, T]. `old_log_prob` serves the metric alone.

    Returns:
        the loss and `actor/ppo_kl`, the mean of old_log_prob - log_prob over the mini-batch's tokens.
    """
    loss = weighted_loss(-advantages * log_prob, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, token_means({"actor/ppo_kl": old_log_prob - log_prob}, response_mask, config)
