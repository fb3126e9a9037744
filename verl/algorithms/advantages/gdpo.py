"""Several rewards, each normalized before they are summed (GDPO, arXiv:2601.05242)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from verl.algorithms.advantages.common import group_samples, outcome_reward, register_adv_est, whitened_on_tokens
from verl.config import AlgorithmConfig


@register_adv_est("gdpo")
def compute_gdpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgorithmConfig | None = None,
    non_tensor_batch: Mapping[str, np.ndarray] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `A = whiten(sum over k of w_k (r_k - mean(r_k)) / (std(r_k) + epsilon))`, mean and std per group.

    With one normalization per reward, a reward of high variance does not dominate the others. A group of one has mean
    0 and std 1. The whitening runs over the tokens of the batch. Only the rewards of `config.gdpo_reward_keys` count:
    the score, and penalties that were subtracted from it, such as the KL penalty, do not.

    Args:
        token_level_rewards: [B, T]; without a config, its row sums are the only reward.
        response_mask: [B, T], 1 for a token of the model.
        index: B group ids.
        epsilon: added to the std.
        norm_adv_by_std_in_grpo: divide by the std.
        config: the `algorithm` section: `gdpo_reward_keys`, `gdpo_reward_weights` (null: all 1) and
            `norm_adv_by_std_in_grpo`, which replaces the argument.
        non_tensor_batch: arrays of B values by name; those of the reward keys hold numbers. None counts as 0, like the
            score: it marks a sample whose reward function failed.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 outside the mask.

    Raises:
        ValueError: no reward keys; the reward function did not return a key, or not as a finite number; the number of
            weights is not the number of keys.
    """
    weights: Sequence[float]
    if config is None:
        rewards, weights = [outcome_reward(token_level_rewards)], [1.0]
    else:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
        keys, weights = _keys_and_weights(config)
        columns = {} if non_tensor_batch is None else non_tensor_batch
        rewards = [_reward(key, columns).to(token_level_rewards.device) for key in keys]
    groups = group_samples(index, token_level_rewards)
    total = torch.zeros_like(token_level_rewards[:, 0], dtype=torch.float64)
    for weight, reward in zip(weights, rewards, strict=True):
        total += weight * (groups.normalized(reward, epsilon) if norm_adv_by_std_in_grpo else groups.centered(reward))
    return whitened_on_tokens(total, response_mask)


def _keys_and_weights(config: AlgorithmConfig) -> tuple[Sequence[str], Sequence[float]]:
    keys, weights = config.gdpo_reward_keys, config.gdpo_reward_weights
    if not keys:
        raise ValueError(
            f"algorithm.gdpo_reward_keys={keys}: gdpo needs the names of the rewards that compute_score returns beside "
            "`score`; set it, for example to [format_reward,accuracy_reward]"
        )
    if weights is None:
        return keys, [1.0] * len(keys)
    if len(weights) != len(keys):
        raise ValueError(
            f"algorithm.gdpo_reward_weights={list(weights)}: {len(weights)} weights for {len(keys)} "
            f"algorithm.gdpo_reward_keys={list(keys)}; give one weight per key"
        )
    return keys, weights


def _reward(key: str, columns: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Return the reward `key` of each sample, [B] float64."""
    if key not in columns:
        raise ValueError(
            f"algorithm.gdpo_reward_keys: the reward function did not return {key!r}; it returned "
            f"{', '.join(sorted(columns))}. Let compute_score return a dict with {key!r}"
        )
    numbers = torch.zeros(len(columns[key]), dtype=torch.float64)
    for i, value in enumerate(columns[key]):
        try:
            numbers[i] = 0.0 if value is None else float(value)
        except (TypeError, ValueError):
            numbers[i] = torch.nan
        if not torch.isfinite(numbers[i]):
            raise ValueError(
                f"algorithm.gdpo_reward_keys: {key!r} of sample {i} is {value!r}; "
                "let compute_score return a finite number"
            )
    return numbers
