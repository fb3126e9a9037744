"""Several rewards, each normalised by itself before they are added up, GDPO: arXiv:2601.05242."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.groups import group, outcome
from verl.algorithms.advantages.registry import register_adv_est
from verl.algorithms.advantages.whitening import whiten


@register_adv_est("gdpo")
def compute_gdpo_outcome_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any | None = None,
    non_tensor_batch: Mapping[str, np.ndarray] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`A = whiten(sum over k of w_k (r_k - mean(r_k)) / (std(r_k) + epsilon))`, mean and deviation (ddof 1) by group.

    So that a reward that varies a lot does not drown the others. A group of one has mean 0 and deviation 1. The
    whitening runs over the tokens of the batch. The rewards are those of `config.gdpo_reward_keys`: the score and what
    was taken off it, a KL penalty for one, play no part.

    Args:
        token_level_rewards: [B, T]; its row sums are the one reward where there is no config.
        response_mask: [B, T], 1 where the model made the token.
        index: B group ids.
        epsilon: added to the deviation.
        norm_adv_by_std_in_grpo: divide by the deviation.
        config: the `algorithm` section: `gdpo_reward_keys`, `gdpo_reward_weights` (1 each where null) and
            `norm_adv_by_std_in_grpo`, which replaces the argument.
        non_tensor_batch: by name, B values; those of the keys are numbers. None, which a sample has whose scorer
            failed, counts 0, as its score does.

    Returns:
        advantages and returns, the same [B, T] float32 values, 0 off the mask.

    Raises:
        ValueError: no keys; a key that the reward function did not return, or not as a finite number; another number of
            weights than keys.
    """
    if config is None:
        rewards, weights = [outcome(token_level_rewards)], [1.0]
    else:
        norm_adv_by_std_in_grpo = config.norm_adv_by_std_in_grpo
        keys, weights = _objectives(config)
        columns = {} if non_tensor_batch is None else non_tensor_batch
        rewards = [_reward(key, columns).to(token_level_rewards.device) for key in keys]
    groups = group(index, token_level_rewards)
    total = torch.zeros_like(token_level_rewards[:, 0], dtype=torch.float64)
    for weight, reward in zip(weights, rewards, strict=True):
        total += weight * (groups.normalised(reward, epsilon) if norm_adv_by_std_in_grpo else groups.centred(reward))
    advantages = whiten(total.unsqueeze(-1).expand(response_mask.shape), response_mask).to(torch.float32)
    return advantages, advantages.clone()


def _objectives(config: Any) -> tuple[Sequence[str], Sequence[float]]:
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
            f"algorithm.gdpo_reward_keys={list(keys)}; give one weight a key"
        )
    return keys, weights


def _reward(key: str, columns: Mapping[str, np.ndarray]) -> torch.Tensor:
    """[B] float64."""
    if key not in columns:
        raise ValueError(
            f"algorithm.gdpo_reward_keys: the reward function returned no {key!r}, but {', '.join(sorted(columns))}; "
            "let compute_score return a dict with it"
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
