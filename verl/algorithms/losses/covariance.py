"""Clip-Cov and KL-Cov (arXiv:2505.22617): losses that restrain the tokens whose covariance is high.

The covariance of a token is (A - mean A)(log_prob - mean log_prob), with means over the whole mini-batch; it drives the
loss of entropy. The tokens are chosen in float64 on the CPU, so that the choice does not depend on the device.
"""

from __future__ import annotations

import torch

from verl.algorithms.losses.common import (
    LossOutput,
    bounded_log_ratio,
    clip_range,
    clipped_surrogate,
    register_policy_loss,
    require_config,
    token_means,
    weighted_loss,
)
from verl.config import ActorConfig


def select_tokens_clip_cov(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    seed: int,
) -> torch.Tensor:
    """Select the tokens of a whole mini-batch whose gradient is dropped; see `register_policy_loss`.

    Candidates are the tokens whose covariance lies between `policy_loss.clip_cov_lb` and `policy_loss.clip_cov_ub`,
    both excluded, and that PPO's clip does not bind. A share of `policy_loss.clip_cov_ratio` of all tokens of the
    mini-batch, rounded down but at least one, is drawn from them at random. The draw depends on `seed` and on the
    number of a token in the mini-batch, not on the padding.

    Returns:
        [B, T] bool.
    """
    settings = config.policy_loss
    covariance = _token_covariance(log_prob, advantages, response_mask)
    ratio = bounded_log_ratio(old_log_prob, log_prob).detach().exp()
    _, clipped = clipped_surrogate(ratio, advantages, *clip_range(config))
    eligible = (covariance > settings.clip_cov_lb) & (covariance < settings.clip_cov_ub)
    eligible &= ~clipped[response_mask.bool()].cpu().bool()
    tokens = len(covariance)
    count = min(max(int(settings.clip_cov_ratio * tokens), 1), int(eligible.sum()))
    draws = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _token_flags(response_mask, draws.masked_fill(~eligible, 2.0).argsort(stable=True)[:count])


@register_policy_loss("clip_cov", select_tokens=select_tokens_clip_cov)
def compute_policy_loss_clip_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    selected_tokens: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the Clip-Cov loss; all tensors are [B, T].

    Per token: max(-A r, -A clip(r, 1 - low, 1 + high)), and 0 for a selected token.

    Args:
        selected_tokens: the rows of `select_tokens_clip_cov` for this micro-batch.

    Returns:
        the loss and `actor/{pg_clipfrac,ppo_kl}`, means over the tokens of the mini-batch: the selected tokens;
        old_log_prob - log_prob.

    Raises:
        ValueError: `selected_tokens` is None.
    """
    kept = ~_require_selection(selected_tokens, "clip_cov")
    ratio = bounded_log_ratio(old_log_prob, log_prob).exp()
    per_token, _ = clipped_surrogate(ratio, advantages, *clip_range(config))
    loss = weighted_loss(per_token * kept, response_mask, loss_agg_mode, config, rollout_is_weights)
    means = {"actor/pg_clipfrac": (~kept).to(log_prob.dtype), "actor/ppo_kl": old_log_prob - log_prob}
    return loss, token_means(means, response_mask, config)


def select_tokens_kl_cov(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: ActorConfig,
    seed: int,
) -> torch.Tensor:
    """Select the tokens of a whole mini-batch that are penalized; see `register_policy_loss`.

    These are the tokens of the highest covariance: a share of `policy_loss.kl_cov_ratio` of all tokens of the
    mini-batch, rounded down but at least one. Among equal values the first ones are taken. Nothing is random: `seed`
    has no effect.

    Returns:
        [B, T] bool.
    """
    covariance = _token_covariance(log_prob, advantages, response_mask)
    count = max(int(len(covariance) * config.policy_loss.kl_cov_ratio), 1)
    return _token_flags(response_mask, covariance.argsort(descending=True, stable=True)[:count])


@register_policy_loss("kl_cov", select_tokens=select_tokens_kl_cov)
def compute_policy_loss_kl_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: torch.Tensor | None = None,
    selected_tokens: torch.Tensor | None = None,
) -> LossOutput:
    """Compute the KL-Cov loss; all tensors are [B, T].

    Per token: -A r, plus coef |log_prob - old_log_prob| for a selected token; coef is
    `config.policy_loss.ppo_kl_coef`.

    Args:
        selected_tokens: the rows of `select_tokens_kl_cov` for this micro-batch.

    Returns:
        the loss and `actor/ppo_kl`, the mean of |log_prob - old_log_prob| over the tokens of the mini-batch.

    Raises:
        ValueError: `selected_tokens` is None.
    """
    selected = _require_selection(selected_tokens, "kl_cov")
    distance = (log_prob - old_log_prob).abs()
    penalty = require_config(config).policy_loss.ppo_kl_coef * distance * selected
    per_token = -advantages * bounded_log_ratio(old_log_prob, log_prob).exp() + penalty
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, token_means({"actor/ppo_kl": distance}, response_mask, config)


def _token_covariance(log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Return the covariance of each of the n tokens in the mask, row by row: [n] float64 on the CPU."""
    mask = response_mask.bool()
    log_prob, advantages = (values.detach()[mask].cpu().double() for values in (log_prob, advantages))
    return (advantages - advantages.mean()) * (log_prob - log_prob.mean())


def _token_flags(response_mask: torch.Tensor, token_numbers: torch.Tensor) -> torch.Tensor:
    """Return [B, T] bool, True at the given tokens; the n tokens of the mask are numbered row by row."""
    mask = response_mask.bool()
    flat = torch.zeros(int(mask.sum()), dtype=torch.bool)
    flat[token_numbers] = True
    flags = torch.zeros_like(mask)
    flags[mask] = flat.to(mask.device)
    return flags


def _require_selection(selected_tokens: torch.Tensor | None, loss_mode: str) -> torch.Tensor:
    """Return `selected_tokens` as bool.

    Raises:
        ValueError: it is None.
    """
    if selected_tokens is None:
        raise ValueError(
            f"selected_tokens=None: {loss_mode} selects its tokens from the whole mini-batch; call "
            f"get_token_selector({loss_mode!r}) on the mini-batch and pass the rows of this micro-batch"
        )
    return selected_tokens.bool()
