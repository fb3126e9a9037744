"""Group Sequence Policy Optimization (GSPO, arXiv:2507.18071): one importance ratio per sequence."""

from __future__ import annotations

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.losses.common import (
    LossOutput,
    clip_range,
    clipped_surrogate,
    register_policy_loss,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig

_LARGEST_LOG_RATIO = 10.0


@register_policy_loss("gspo")
def compute_policy_loss_gspo(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the GSPO-token loss; all tensors are [B, T].

    Per token: max(-A s_t, -A clip(s_t, 1 - low, 1 + high)), with s_t = sg(s) exp(log_prob_t - sg(log_prob_t)) and
    s = exp(mean over the sequence of log_prob - old_log_prob). The value of s_t is s, and its gradient is that of the
    token itself. log s is at most 10. The clip range of the paper is much narrower than PPO's: low 3e-4, high 4e-4.

    The aggregation is always `seq-mean-token-mean`; `loss_agg_mode` has no effect.

    Returns:
        the loss and `actor/{pg_clipfrac,pg_clipfrac_lower,ppo_kl}`, means over the tokens of the mini-batch: the clip
        binds; 0, since there is no dual clip; old_log_prob - log_prob.
    """
    low, high = clip_range(config)
    log_ratio = log_prob - old_log_prob
    sequence_log_ratio = sequence_mean(log_ratio, response_mask).detach().unsqueeze(-1)
    # Subtract first: the difference is exactly 0, so the value is exactly s.
    ratio = (log_prob - log_prob.detach() + sequence_log_ratio).clamp(max=_LARGEST_LOG_RATIO).exp()
    per_token, clipped = clipped_surrogate(ratio, advantages, low, high)
    loss = weighted_loss(per_token, response_mask, "seq-mean-token-mean", config, rollout_is_weights)
    metrics = token_means({"actor/pg_clipfrac": clipped, "actor/ppo_kl": -log_ratio}, response_mask, config)
    return loss, {**metrics, "actor/pg_clipfrac_lower": loss.new_zeros(())}
