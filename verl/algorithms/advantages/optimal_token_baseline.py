"""A baseline a token, weighted by how much gradient a sample has gathered by then: the optimal token baseline (OTB).

The baseline of least variance weights returns by the squared norm of the gradient (Greensmith, Bartlett and Baxter,
JMLR 5, 2004). Here that norm is taken with respect to the logits, where it follows from two columns:
`|e_token - pi|^2 = 1 - 2 pi(token) + sum pi^2`, added up over a sample's tokens so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import Groups, group, suffix_sums
from verl.algorithms.advantages.registry import register_adv_est


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
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward from each token on, less a baseline of the group at the same column.

    `A_t = G_t - B_t`, `B_t = sum(W_t G_t) / (sum(W_t) + epsilon)` over the samples whose mask has column t,
    `W_t = sum to t of rho^2 (1 - 2 pi + sum pi^2)`, rho being `rollout_is_weights`. A sample that is alone in its group
    (empty responses do not count) has baseline 0.

    Args:
        token_level_rewards: [B, T]; a reward that stands off the mask is not seen.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        old_log_probs: [B, T] log pi(token).
        sum_pi_squared: [B, T] sum of squared probabilities over the vocabulary.
        rollout_is_weights: [B, T] importance weights of rollout against trainer; None for 1.
        handle_zero_tail: a token at whose column no other sample of the group has one, as beyond the second longest
            response, has baseline 0. Otherwise it is its own baseline, and its advantage is 0.
        epsilon: added to the sum of the weights.
        config: taken as by every estimator; nothing of it plays a part.

    Returns:
        advantages and returns (the undiscounted reward to go), [B, T] float32, 0 off the mask.
    """
    live, returns, weights = _columns(
        token_level_rewards, response_mask, old_log_probs, sum_pi_squared, rollout_is_weights
    )
    advantages = _advantages(live, returns, weights, group(index, returns), handle_zero_tail, epsilon)
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
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`compute_optimal_token_baseline_advantage` for responses with tools' text in between.

    The k-th token that the model made is compared with the k-th of the others, wherever it stands.
    """
    live, returns, weights = _columns(
        token_level_rewards, response_mask, old_log_probs, sum_pi_squared, rollout_is_weights
    )
    order = torch.argsort((~live).to(torch.int8), dim=1, stable=True)
    live_k, returns_k, weights_k = (column.gather(1, order) for column in (live, returns, weights))
    advantages_k = _advantages(live_k, returns_k, weights_k, group(index, returns), handle_zero_tail, epsilon)
    advantages = torch.zeros_like(returns).scatter(1, order, advantages_k)
    return advantages.to(torch.float32), returns.to(torch.float32)


def _columns(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    old_log_probs: torch.Tensor,
    sum_pi_squared: torch.Tensor,
    rollout_is_weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[B, T] mask (bool), reward to go and summed gradient norm, both 0 off the mask."""
    live = response_mask.bool()
    returns = suffix_sums(torch.where(live, token_level_rewards.double(), 0.0))
    # It is a squared norm: what is below 0 is rounding, and sums of it could cancel to a division by nothing.
    norm = (1 - 2 * old_log_probs.double().exp() + sum_pi_squared.double()).clamp(min=0)
    if rollout_is_weights is not None:
        norm = norm * rollout_is_weights.double().square()
    weights = torch.where(live, norm, 0.0).cumsum(-1)
    return live, torch.where(live, returns, 0.0), torch.where(live, weights, 0.0)


def _advantages(
    live: torch.Tensor,
    returns: torch.Tensor,
    weights: torch.Tensor,
    groups: Groups,
    handle_zero_tail: bool,
    epsilon: float,
) -> torch.Tensor:
    baselines = groups.sum(weights * returns) / (groups.sum(weights) + epsilon)
    alone = (groups.sum(live.any(dim=1)) <= 1).unsqueeze(-1)
    if handle_zero_tail:
        alone = alone | (groups.sum(live) <= 1)
    return torch.where(live, returns - torch.where(alone, 0.0, baselines), 0.0)
