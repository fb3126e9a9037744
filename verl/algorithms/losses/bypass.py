"""Policy loss of `algorithm.rollout_correction.bypass_mode`: the rollout policy replaces the old policy."""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import LossOutput, clip_range, register_policy_loss, token_means, weighted_loss
from verl.algorithms.losses.vanilla import clipped_policy_loss
from verl.algorithms.rollout_correction import importance_weights, rejection_mask
from verl.config import ActorConfig
from verl.config.rollout_correction import Correction


@register_policy_loss("bypass_mode")
def compute_policy_loss_bypass_mode(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the loss of the current policy pi on tokens of the rollout policy mu; all tensors are [B, T].

    The rows must be whole sequences. Reads `config.rollout_correction`, a `Correction`, which is added to the `actor`
    section. Per token, by its `loss_type`:

    - `ppo_clip`: PPO's clipped loss on the ratio pi/mu, with the clip ratios of the `actor` section. The ratio is the
      importance weight, so there is no other weight.
    - `reinforce`: -w A log pi, with w the bounded importance weight pi/mu without gradient; w = 1 without `rollout_is`.

    A token that the `rejections` reject under the current policy has loss 0 and still counts in the denominators: a
    mini-batch is cut into micro-batches before the rejected tokens are known.

    Args:
        old_log_prob: log mu.
        log_prob: log pi, with gradient.
        config: also has `global_batch_info` if the mini-batch is cut.

    Returns:
        the loss and means over the tokens of the mini-batch: `actor/ppo_kl` = log mu - log pi; with ppo_clip
        `actor/{pg_clipfrac,pg_clipfrac_lower}`, which count a rejected token as not clipped; with rejection
        `actor/bypass_masked_fraction`; with weights `actor/bypass_is_mean`.

    Raises:
        ValueError: `config.rollout_correction` is not a correction in bypass mode, or `rollout_is_weights` is given.
    """
    correction = getattr(config, "rollout_correction", None)
    if config is None or not isinstance(correction, Correction) or not correction.bypass_mode:
        raise ValueError(
            f"config.rollout_correction={correction}: loss_mode=bypass_mode requires "
            "algorithm.rollout_correction.bypass_mode=True; set that key and leave actor.policy_loss.loss_mode unset"
        )
    if rollout_is_weights is not None:
        raise ValueError("rollout_is_weights must be None: in bypass mode the loss computes the weights itself")
    if correction.loss_type == "ppo_clip":
        per_token, means = _clipped(old_log_prob, log_prob, advantages, config)
    else:
        per_token, means = _reinforce(old_log_prob, log_prob, advantages, response_mask, correction)
    if correction.rejections:
        kept = rejection_mask(log_prob, old_log_prob, response_mask, correction.rejections).bool()
        per_token = per_token.masked_fill(~kept, 0.0)
        means |= {name: values.masked_fill(~kept, 0.0) for name, values in means.items() if "clipfrac" in name}
        means["actor/bypass_masked_fraction"] = (~kept).to(per_token.dtype)
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, None)
    return loss, token_means(means, response_mask, config)


def _clipped(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, config: ActorConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the metrics of each token, [B, T]."""
    low, high = clip_range(config)
    per_token, clipped, clipped_lower, kl = clipped_policy_loss(
        old_log_prob, log_prob, advantages, clip_low=low, clip_high=high, clip_c=config.clip_ratio_c
    )
    return per_token, {"actor/pg_clipfrac": clipped, "actor/pg_clipfrac_lower": clipped_lower, "actor/ppo_kl": kl}


def _reinforce(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    correction: Correction,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and the metrics of each token, [B, T]."""
    means = {"actor/ppo_kl": old_log_prob - log_prob}
    weights = importance_weights(log_prob, old_log_prob, response_mask, correction)
    if weights is None:
        return -advantages * log_prob, means
    return -weights * advantages * log_prob, {**means, "actor/bypass_is_mean": weights}
