"""Group-relative advantages: GRPO (arXiv:2402.03300) and, without the division by std, Dr. GRPO (arXiv:2503.20783)."""

from __future__ import annotations

import numpy as np
import torch

from verl.algorithms.advantages.common import group_samples, on_tokens, outcome_reward, register_adv_est
from verl.config import AlgorithmConfig


@register_adv_est("grpo_vectorized")
@register_adv_est("grpo")
def compute_grpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgorithmConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = (R - mean(R)) / (std(R) + epsilon)`, mean and unbiased std (ddof 1) per group.

    A group of one has mean 0 and std 1, so its advantage is about its reward.

    Args:
        token_level_rewards: [B, T]; the reward of a sample is the sum of its row.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids, any hashable or comparable values.
        epsilon: added to the std.
        norm_adv_by_std_in_grpo: divide by the std.
        config: the `algorithm` section; if given, its `norm_adv_by_std_in_grpo` replaces the argument.

    Returns:
        advantages and returns, the same [B, T] float32 values: the advantage of a sample at each of its tokens, 0
        outside the mask.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
    reward = outcome_reward(token_level_rewards)
    groups = group_samples(index, reward)
    advantage = groups.normalized(reward, epsilon) if norm_adv_by_std_in_grpo else groups.centered(reward)
    return on_tokens(advantage, response_mask)


# Upstream verl has two implementations of this formula.
compute_grpo_vectorized_outcome_advantage = compute_grpo_outcome_advantage
