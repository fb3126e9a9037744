"""What the estimators share: a sample's reward, its group's statistics, and a number a sample laid on its tokens.

Everything here is float64: in float32 the mean of equal rewards is off by a rounding, which a deviation of
0 + epsilon blows up to an advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Groups:
    """The samples of one prompt, for B samples. Statistics come back to each sample: [B, ...], its own group's.

    Attributes:
        of: [B] int64, each sample's group, numbered from 0.
        count: number of groups.
    """

    of: torch.Tensor
    count: int

    @property
    def size(self) -> torch.Tensor:
        """[B] samples of the group."""
        return torch.bincount(self.of, minlength=self.count).double()[self.of]

    @property
    def single(self) -> torch.Tensor:
        """[B] bool: there is no other sample in the group."""
        return self.size == 1

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the group of [B, ...]."""
        zeros = torch.zeros(self.count, *values.shape[1:], dtype=torch.float64, device=values.device)
        return zeros.index_add_(0, self.of, values.double())[self.of]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over the group of [B]."""
        return self.sum(values) / self.size

    def std(self, values: torch.Tensor) -> torch.Tensor:
        """Unbiased deviation (ddof 1) within the group of [B]; 0 in a group of one."""
        squares = self.sum((values - self.mean(values)).square())
        return (squares / (self.size - 1).clamp(min=1)).sqrt()

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Maximum over the group of [B]."""
        lowest = torch.full((self.count,), -torch.inf, dtype=torch.float64, device=values.device)
        return lowest.scatter_reduce_(0, self.of, values.double(), "amax")[self.of]

    def centred(self, values: torch.Tensor) -> torch.Tensor:
        """[B] values less their group's mean; a group of one counts as one of mean 0, and keeps its value."""
        return torch.where(self.single, values, values - self.mean(values))

    def normalised(self, values: torch.Tensor, epsilon: float) -> torch.Tensor:
        """[B] `centred` over deviation + epsilon; a group of one counts as one of deviation 1."""
        deviation = torch.where(self.single, torch.ones_like(values), self.std(values))
        return self.centred(values) / (deviation + epsilon)


def group(index: Sequence[Any] | np.ndarray | torch.Tensor, like: torch.Tensor) -> Groups:
    """Groups of equal ids.

    Args:
        index: B group ids, any hashable or comparable values.
        like: [B, ...]; its first dimension and device are those of the samples.

    Raises:
        ValueError: another number of ids than samples.
    """
    if len(index) != like.shape[0]:
        raise ValueError(f"index has {len(index)} group ids for {like.shape[0]} samples: give one id a sample")
    ids, of = np.unique(np.asarray(index).astype(str), return_inverse=True)
    return Groups(torch.as_tensor(of.reshape(-1), dtype=torch.int64, device=like.device), len(ids))


def outcome(token_level_rewards: torch.Tensor) -> torch.Tensor:
    """A sample's reward, [B] float64: the sum of its row [B, T].

    The whole row: the score of an empty response stands where its mask is 0, and still counts in its group.
    """
    return token_level_rewards.double().sum(dim=-1)


def on_tokens(values: torch.Tensor, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, the same [B, T] float32 values in two tensors: those of [B] samples, 0 off the mask."""
    spread = torch.where(response_mask.bool(), values.unsqueeze(-1), 0.0).to(torch.float32)
    return spread, spread.clone()


def suffix_sums(values: torch.Tensor) -> torch.Tensor:
    """At each token of [B, T], the sum from there to the end."""
    return values.flip(-1).cumsum(-1).flip(-1)
