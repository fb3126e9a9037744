"""Shared parts of the advantage estimators: registry, group statistics, whitening, and values per token.

Each estimator is a function in its own file. Apart from torch it needs this file alone.

The arithmetic is float64. In float32 the mean of equal rewards is off by a rounding error, and the division by
std 0 + epsilon would turn it into a large advantage.

Names in the docstrings of the estimators: B samples, T tokens of a response; R, the reward of a sample; a group, the
samples of one prompt; std, the unbiased standard deviation (ddof 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

import numpy as np
import torch

from verl.extension.registry import F, Registry

ADV_ESTIMATORS = Registry("advantage estimator", "algorithm.adv_estimator")
_WHITENING_EPSILON = 1e-8


class AdvantageEstimator(StrEnum):
    """The built-in estimators; a member equals its name, the value of `algorithm.adv_estimator`."""

    GAE = "gae"
    GDPO = "gdpo"
    GPG = "gpg"
    GRPO = "grpo"
    GRPO_PASSK = "grpo_passk"
    GRPO_VECTORIZED = "grpo_vectorized"
    OPO = "opo"
    OPTIMAL_TOKEN_BASELINE = "optimal_token_baseline"
    REINFORCE_PLUS_PLUS = "reinforce_plus_plus"
    REINFORCE_PLUS_PLUS_BASELINE = "reinforce_plus_plus_baseline"
    REMAX = "remax"
    RLOO = "rloo"
    RLOO_VECTORIZED = "rloo_vectorized"
    TIR_OPTIMAL_TOKEN_BASELINE = "tir_optimal_token_baseline"


def register_adv_est(name: str | Enum) -> Callable[[F], F]:
    """Return a decorator that registers a function as `algorithm.adv_estimator=<name>`.

    A member of an enum registers its value.

    The function is called with keywords, one for each of its parameters that is

    - `token_level_rewards` [B, T] float32, `response_mask` [B, T], `index` (array of B group ids) or `config` (the
      `algorithm` section); a function with `**kwargs` gets all four;
    - a tensor column of the batch: `old_log_probs` [B, T], `values` [B, T], `reward_baselines` [B], ...;
    - `non_tensor_batch`: object arrays of B by name, including the values that a reward function returned beside its
      score.

    It returns `(advantages, returns)`, each [B, T] float32. Any other parameter needs a default.
    """
    return ADV_ESTIMATORS.register(name)


def get_adv_estimator_fn(name: str | Enum) -> Callable[..., Any]:
    """Return the estimator registered under `name`.

    Raises:
        ValueError: no estimator has that name; the message lists the registered names.
    """
    return ADV_ESTIMATORS.get(name)


@dataclass(frozen=True)
class Groups:
    """Groups of B samples, one group per prompt. Each statistic is returned per sample: [B, ...], of its own group.

    Attributes:
        number: [B] int64, the group of each sample, counted from 0.
        count: number of groups.
    """

    number: torch.Tensor
    count: int

    @property
    def size(self) -> torch.Tensor:
        """Number of samples in the group, [B] float64."""
        return torch.bincount(self.number, minlength=self.count).double()[self.number]

    @property
    def is_single(self) -> torch.Tensor:
        """True for a sample that is alone in its group, [B] bool."""
        return self.size == 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the group of [B, ...]."""
        zeros = torch.zeros(self.count, *values.shape[1:], dtype=torch.float64, device=values.device)
        return zeros.index_add_(0, self.number, values.double())[self.number]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the group of [B]."""
        return self.sum(values) / self.size

    def std(self, values: torch.Tensor) -> torch.Tensor:
        """Return the unbiased standard deviation (ddof 1) in the group of [B]; 0 in a group of one."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.size - 1).clamp(min=1)).sqrt()

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Return the maximum over the group of [B]."""
        lowest = torch.full((self.count,), -torch.inf, dtype=torch.float64, device=values.device)
        return lowest.scatter_reduce_(0, self.number, values.double(), "amax")[self.number]

    def centered(self, values: torch.Tensor) -> torch.Tensor:
        """Return [B] values minus the mean of their group; a group of one has mean 0, so it keeps its value."""
        return torch.where(self.is_single, values, values - self.mean(values))

    def normalized(self, values: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return [B] `centered` / (std + epsilon); a group of one has std 1."""
        std = torch.where(self.is_single, torch.ones_like(values), self.std(values))
        return self.centered(values) / (std + epsilon)


def group_samples(index: Sequence[Any] | np.ndarray | torch.Tensor, like: torch.Tensor) -> Groups:
    """Group samples by equal ids.

    Args:
        index: B group ids, any hashable or comparable values.
        like: [B, ...]; the samples, for their number and their device.

    Raises:
        ValueError: the number of ids is not the number of samples.
    """
    if len(index) != like.shape[0]:
        raise ValueError(f"index has {len(index)} group ids for {like.shape[0]} samples: pass one id per sample")
    ids, number = np.unique(np.asarray(index).astype(str), return_inverse=True)
    return Groups(torch.as_tensor(number.reshape(-1), dtype=torch.int64, device=like.device), len(ids))


def outcome_reward(token_level_rewards: torch.Tensor) -> torch.Tensor:
    """Return the reward R of each sample, [B] float64: the sum of its row [B, T].

    The sum runs over the whole row, not over the mask: an empty response has its score at a token outside the mask, and
    this score must still count in its group.
    """
    return token_level_rewards.double().sum(dim=-1)


def on_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns: [B] values at each token of the sample, 0 outside the mask.

    Both are [B, T] float32 with the same values, in two tensors.
    """
    spread = torch.where(response_mask.bool(), values.unsqueeze(-1), 0.0).to(torch.float32)
    return spread, spread.clone()


def whitened_on_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns as `on_tokens`, whitened over the tokens of the batch."""
    whitened = whiten(values.unsqueeze(-1).expand(response_mask.shape), response_mask).to(torch.float32)
    return whitened, whitened.clone()


def suffix_sums(values: torch.Tensor) -> torch.Tensor:
    """Return, for each token of [B, T], the sum from this token to the end of the row."""
    return values.flip(-1).cumsum(-1).flip(-1)


def whiten(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Return `(v - mean) / sqrt(var + 1e-8)`, with mean and unbiased variance over all tokens of the mask.

    A single token has no variance and keeps its value. Equal values become 0.

    Args:
        values: [B, T]; values outside the mask, including NaN, are ignored.
        response_mask: [B, T].

    Returns:
        [B, T] float64, 0 outside the mask.
    """
    mask = response_mask.bool()
    values = torch.where(mask, values.double(), 0.0)
    selected = values[mask]
    if selected.numel() < 2:
        return values
    whitened = (values - selected.mean()) * (selected.var(correction=1) + _WHITENING_EPSILON).rsqrt()
    return torch.where(mask, whitened, 0.0)
