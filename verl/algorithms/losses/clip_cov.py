"""Clip-Cov (arXiv:2505.22617): PPO's loss, where a few tokens of high covariance get no gradient."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import bounded_log_ratio, clip_range, clipped_surrogate, token_means, weighted_loss
from verl.algorithms.losses.covariance import mark, needed, token_covariance
from verl.algorithms.losses.registry import register_policy_loss


def select_tokens_clip_cov(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any,
    seed: int,
) -> torch.Tensor:
    """[B, T] bool: the tokens of a whole mini-batch whose gradient is dropped; see `register_policy_loss`.

    At random, those whose covariance (A - mean A)(log_prob - mean log_prob) lies between `policy_loss.clip_cov_lb` and
    `policy_loss.clip_cov_ub`, both excluded, and which PPO's clip leaves alone: `policy_loss.clip_cov_ratio` of the
    mini-batch's tokens, rounded down, but at least one. Which of them depends on `seed` and on a token's number among
    the mini-batch's, not on the padding.
    """
    settings = config.policy_loss
    covariance = token_covariance(log_prob, advantages, response_mask)
    ratio = bounded_log_ratio(old_log_prob, log_prob).detach().exp()
    _, clipped = clipped_surrogate(ratio, advantages, *clip_range(config))
    eligible = (covariance > settings.clip_cov_lb) & (covariance < settings.clip_cov_ub)
    eligible &= ~clipped[response_mask.bool()].cpu().bool()
    tokens = len(covariance)
    count = min(max(int(settings.clip_cov_ratio * tokens), 1), int(eligible.sum()))
    lots = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mark(response_mask, lots.masked_fill(~eligible, 2.0).argsort(stable=True)[:count])


@register_policy_loss("clip_cov", select_tokens=select_tokens_clip_cov)
def compute_policy_loss_clip_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    selected_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) of each token, 0 where it is selected; all tensors [B, T].

    r = exp(log_prob - old_log_prob), the exponent kept in +-20. `selected_tokens`: this part's rows of
    `select_tokens_clip_cov`.

    Returns:
        the loss and `actor/{pg_clipfrac,ppo_kl}`, means over the mini-batch's tokens: the share of selected ones;
        old_log_prob - log_prob.

    Raises:
        ValueError: `selected_tokens` is None.
    """
    kept = ~needed(selected_tokens, "clip_cov")
    ratio = bounded_log_ratio(old_log_prob, log_prob).exp()
    per_token, _ = clipped_surrogate(ratio, advantages, *clip_range(config))
    loss = weighted_loss(per_token * kept, response_mask, loss_agg_mode, config, rollout_is_weights)
    shares = {"actor/pg_clipfrac": (~kept).to(log_prob.dtype), "actor/ppo_kl": old_log_prob - log_prob}
    return loss, token_means(shares, response_mask, config)
