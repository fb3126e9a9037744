"""Group Sequence Policy Optimization (arXiv:2507.18071): one importance ratio for a whole sequence."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.losses.common import clip_range, clipped_surrogate, token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss

_LARGEST_LOG_RATIO = 10.0


@register_policy_loss("gspo")
def compute_policy_loss_gspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clip on the sequence's ratio s = exp(mean over its tokens of log_prob - old_log_prob); all tensors [B, T].

    This is GSPO-token: token t has the ratio sg(s) exp(log_prob_t - sg(log_prob_t)), sg being without gradient, whose
    value is s and whose gradient is that token's own. log s is kept below 10. The paper's clip range is far narrower
    than PPO's: 3e-4 below, 4e-4 above.

    The aggregation is always `seq-mean-token-mean`; `loss_agg_mode` has no effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the mini-batch's tokens; there is no
        dual clip, so the second one is 0.
    """
    low, high = clip_range(config)
    log_ratio = log_prob - old_log_prob
    of_sequence = sequence_mean(log_ratio, response_mask).detach().unsqueeze(-1)
    # the difference first: it is exactly 0
    ratio = (log_prob - log_prob.detach() + of_sequence).clamp(max=_LARGEST_LOG_RATIO).exp()
    per_token, clipped = clipped_surrogate(ratio, advantages, low, high)
    loss = weighted_loss(per_token, response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    metrics = token_means({"actor/pg_clipfrac": clipped, "actor/ppo_kl": -log_ratio}, response_mask, config)
    return loss, {**metrics, "actor/pg_clipfrac_lower": loss.new_zeros(())}
