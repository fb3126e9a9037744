"""The policy loss of `algorithm.rollout_correction.bypass_mode`: the policy that generated stands for the old one."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import clip_range, token_means, weighted_loss
from verl.algorithms.losses.registry import register_policy_loss
from verl.algorithms.losses.vanilla import clipped_policy_loss
from verl.algorithms.rollout_correction import importance_weights, rejection_mask
from verl.config.rollout_correction import Correction


@register_policy_loss("bypass_mode")
def compute_policy_loss_bypass_mode(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of pi, the present policy, on tokens of mu, the rollout's; all tensors [B, T], whole sequences.

    Reads `config.rollout_correction`, a `Correction`, and with its `loss_type`:

    - `ppo_clip`: PPO's clipped loss on the ratio pi/mu, with the clip ratios of the `actor` section. The ratio is the
      importance weight, so there are no others.
    - `reinforce`: -w A log pi, w the bounded importance weight pi/mu without gradient, 1 without `rollout_is`.

    What `rejections` reject under the present policy has loss 0 and still counts in the denominators: a mini-batch is
    cut into micro-batches before anyone knows what will be rejected.

    Args:
        old_log_prob: log mu.
        log_prob: log pi, with gradient.
        config: also has `global_batch_info` where the mini-batch is cut.

    Returns:
        the loss and means over the mini-batch's tokens: `actor/ppo_kl` = log mu - log pi; with ppo_clip
        `actor/{pg_clipfrac,pg_clipfrac_lower}`, a rejected token counting as not clipped; with rejection
        `actor/bypass_masked_fraction`; with weights `actor/bypass_is_mean`.

    Raises:
        ValueError: there is no correction in bypass mode to read, or weights were made elsewhere.
    """
    correction = getattr(config, "rollout_correction", None)
    if not isinstance(correction, Correction) or not correction.bypass_mode:
        raise ValueError(
            f"config.rollout_correction={correction}: the loss bypass_mode belongs to "
            "algorithm.rollout_correction.bypass_mode=True; set that, and leave actor.policy_loss.loss_mode alone"
        )
    if rollout_is_weights is not None:
        raise ValueError("rollout_is_weights are given: in bypass mode the loss makes its own from the present policy")
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
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, config: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
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
    means = {"actor/ppo_kl": old_log_prob - log_prob}
    weights = importance_weights(log_prob, old_log_prob, response_mask, correction)
    if weights is None:
        return -advantages * log_prob, means
    return -weights * advantages * log_prob, {**means, "actor/bypass_is_mean": weights}
