"""Group-relative advantages: GRPO (arXiv:2402.03300) and, undivided by the deviation, Dr. GRPO (arXiv:2503.20783)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.trainer.ppo.advantages.registry import register_adv_est


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
    # float64: in float32 the mean of equal rewards is off by rounding, which a deviation of 0 + epsilon blows up
    reward = token_level_rewards.double().sum(dim=-1)
    if len(index) != reward.shape[0]:
        raise ValueError(f"index has {len(index)} group ids for {reward.shape[0]} samples: give one id a sample")
    _, group_of = np.unique(np.asarray(index).astype(str), return_inverse=True)
    group = torch.as_tensor(group_of.reshape(-1), dtype=torch.int64, device=reward.device)
    advantage = _normalise(reward, group, epsilon, norm_adv_by_std_in_grpo)
    advantages = (advantage.unsqueeze(-1) * response_mask).to(torch.float32)
    return advantages, advantages.clone()


def _normalise(reward: torch.Tensor, group: torch.Tensor, epsilon: float, by_std: bool) -> torch.Tensor:
    """Rewards [B] relative to their group [B]."""
    if reward.numel() == 0:
        return reward
    size = torch.bincount(group).to(reward.dtype)
    mean = torch.zeros_like(size).index_add_(0, group, reward) / size
    centred = reward - mean[group]
    variance = torch.zeros_like(size).index_add_(0, group, centred.square()) / (size - 1).clamp(min=1)
    single = size[group] == 1
    centred = torch.where(single, reward, centred)
    if not by_std:
        return centred
    deviation = torch.where(single, torch.ones_like(centred), variance.sqrt()[group])
    return centred / (deviation + epsilon)
