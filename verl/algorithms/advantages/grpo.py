"""Group-relative advantages: GRPO (arXiv:2402.03300) and, undivided by the deviation, Dr. GRPO (arXiv:2503.20783)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, on_tokens, outcome
from verl.algorithms.advantages.registry import register_adv_est


@register_adv_est("grpo_vectorized")
@register_adv_est("grpo")
def compute_grpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's total reward against the other samples of its group.

    `A = (R - mean(R)) / (std(R) + epsilon)` with the unbiased deviation (ddof 1). A group of one has mean 0 and
    deviation 1, so that its advantage is about its reward.

    Args:
        token_level_rewards: [B, T]; a sample's reward is the sum of its row.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids, any hashable or comparable values.
        epsilon: added to the deviation.
        norm_adv_by_std_in_grpo: divide by the deviation.
        config: the `algorithm` section; its `norm_adv_by_std_in_grpo`, where given, replaces the argument.

    Returns:
        advantages and returns, the same [B, T] float32 values: a sample's advantage on each of its tokens, 0 elsewhere.
    """
    if config is not None:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
    reward = outcome(token_level_rewards)
    groups = group(index, reward)
    advantage = groups.normalised(reward, epsilon) if norm_adv_by_std_in_grpo else groups.centred(reward)
    return on_tokens(advantage, response_mask)


# verl has two implementations of the one formula.
compute_grpo_vectorized_outcome_advantage = compute_grpo_outcome_advantage
