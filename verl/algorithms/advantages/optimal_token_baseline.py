"""Optimal token baseline (OTB): a baseline per token, weighted by the gradient norm up to that token.

The baseline of least variance weights returns by the squared norm of the gradient (Greensmith, Bartlett and Baxter,
JMLR 5, 2004). Here the gradient is taken with respect to the logits. Its squared norm follows from two columns:
`|e_token - pi|^2 = 1 - 2 pi(token) + sum pi^2`, summed over the tokens of a sample so far.
"""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import Groups, group_samples, register_adv_est, suffix_sums
from verl.config import AlgorithmConfig


@register_adv_est("optimal_token_baseline")
def compute_optimal_token_baseline_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    old_log_probs: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    rollout_is_weights: torch.Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the reward to go minus a baseline of the group at the same column.

    `A_t = G_t - B_t`, `B_t = sum(W_t G_t) / (sum(W_t) + epsilon)` over the samples whose mask has column t,
    `W_t = sum up to t of rho^2 (1 - 2 pi + sum pi^2)`, with rho = `rollout_is_weights`. A sample that is alone in its
    group has baseline 0; empty responses are not counted.

    Args:
        token_level_rewards: [B, T]; a reward outside the mask is ignored.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        old_log_probs: [B, T] log pi(token).
        sum_pi_squared: [B, T] sum of squared probabilities over the vocabulary.
        rollout_is_weights: [B, T] importance weights of the trainer's policy against the rollout policy; None for 1.
        handle_zero_tail: a token has baseline 0 if no other sample of the group has a token at its column, for example
            beyond the second longest response. If False, such a token is its own baseline and has advantage 0.
        epsilon: added to the sum of the weights.
        config: not used; every estimator accepts it.

    Returns:
        advantages and returns (the undiscounted reward to go), [B, T] float32, 0 outside the mask.
    """
    mask, returns, weights = _columns(
        token_level_rewards, response_mask, old_log_probs, sum_pi_squared, rollout_is_weights
    )
    advantages = _advantages(mask, returns, weights, group_samples(index, returns), handle_zero_tail, epsilon)
    return advantages.to(torch.float32), returns.to(torch.float32)


@register_adv_est("tir_optimal_token_baseline")
def compute_multi_turn_optimal_token_baseline_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    old_log_probs: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    rollout_is_weights: torch.Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: float = 1e-8,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `compute_optimal_token_baseline_advantage` for responses that contain text of tools.

    The k-th token of the model is compared with the k-th token of the other samples, at any column.
    """
    mask, returns, weights = _columns(
        token_level_rewards, response_mask, old_log_probs, sum_pi_squared, rollout_is_weights
    )
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    mask_k, returns_k, weights_k = (column.gather(1, order) for column in (mask, returns, weights))
    advantages_k = _advantages(mask_k, returns_k, weights_k, group_samples(index, returns), handle_zero_tail, epsilon)
    advantages = torch.zeros_like(returns).scatter(1, order, advantages_k)
    return advantages.to(torch.float32), returns.to(torch.float32)


def _columns(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    old_log_probs: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    rollout_is_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the mask (bool), the reward to go G and the weights W (float64, 0 outside the mask), each [B, T]."""
    mask = response_mask.bool()
    returns = suffix_sums(torch.where(mask, token_level_rewards.double(), 0.0))
    # A squared norm is never negative. Rounding errors below 0 could cancel in the sum, which is a divisor.
    norm = (1 - 2 * old_log_probs.double().exp() + sum_pi_squared.double()).clamp(min=0)
    if rollout_is_weights is not None:
        norm = norm * rollout_is_weights.double().square()
    weights = torch.where(mask, norm, 0.0).cumsum(-1)
    return mask, torch.where(mask, returns, 0.0), torch.where(mask, weights, 0.0)


def _advantages(
    mask: torch.Tensor,
    returns: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    handle_zero_tail: bool,
    epsilon: float,
) -> torch.Tensor:
    baselines = groups.sum(weights * returns) / (groups.sum(weights) + epsilon)
    alone = (groups.sum(mask.any(dim=1)) <= 1).unsqueeze(-1)
    if handle_zero_tail:
        alone = alone | (groups.sum(mask) <= 1)
    return torch.where(mask, returns - torch.where(alone, 0.0, baselines), 0.0)
