"""KL-Cov (arXiv:2505.22617): the policy gradient, where the tokens of highest covariance pay for moving away."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.losses.common import bounded_log_ratio, required, token_means, weighted_loss
from verl.algorithms.losses.covariance import mark, needed, token_covariance
from verl.algorithms.losses.registry import register_policy_loss


def select_tokens_kl_cov(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any,
    seed: int,
) -> torch.Tensor:
    """[B, T] bool: the tokens of a whole mini-batch that are penalised; see `register_policy_loss`.

    Those whose covariance (A - mean A)(log_prob - mean log_prob) is highest: `policy_loss.kl_cov_ratio` of the
    mini-batch's tokens, rounded down, but at least one; of equal ones the first. Nothing is random: `seed` has no
    effect.
    """
    covariance = token_covariance(log_prob, advantages, response_mask)
    count = max(int(len(covariance) * config.policy_loss.kl_cov_ratio), 1)
    return mark(response_mask, covariance.argsort(descending=True, stable=True)[:count])


@register_policy_loss("kl_cov", select_tokens=select_tokens_kl_cov)
def compute_policy_loss_kl_cov(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    selected_tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-A r of each token, and where it is selected + coef |log_prob - old_log_prob|; all tensors [B, T].

    r = exp(log_prob - old_log_prob), the exponent kept in +-20; coef is `config.policy_loss.ppo_kl_coef`.
    `selected_tokens`: this part's rows of `select_tokens_kl_cov`.

    Returns:
        the loss and `actor/ppo_kl`, the mean of |log_prob - old_log_prob| over the mini-batch's tokens.

    Raises:
        ValueError: `selected_tokens` is None.
    """
    selected = needed(selected_tokens, "kl_cov")
    distance = (log_prob - old_log_prob).abs()
    penalty = required(config).policy_loss.ppo_kl_coef * distance * selected
    per_token = -advantages * bounded_log_ratio(old_log_prob, log_prob).exp() + penalty
    loss = weighted_loss(per_token, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, token_means({"actor/ppo_kl": distance}, response_mask, config)
