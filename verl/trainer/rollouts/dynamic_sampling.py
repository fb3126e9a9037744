"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups whose samples all did equally well teach nothing.

They are dropped, and further prompts are generated until the step's batch is full of others:

    groups = GroupFilter(config.algorithm.filter_groups, train_batch_size=..., pad_token_id=...)
    while not groups.full:
        groups.add(<a generation batch>)
    batch = groups.take()
"""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from verl.config import FilterGroupsConfig
from verl.protocol import DataProto
from verl.trainer.rollouts.batch_padding import pad_and_concat

TOKEN_METRICS = ("seq_reward", "seq_final_reward")
_ENABLE = "algorithm.filter_groups"
_BARREN_STEPS, _BARREN_PROMPTS = 64, 256


class DynamicSamplingError(RuntimeError):
    """Not enough groups whose samples differ, within the generation batches that are allowed."""


def group_values(batch: DataProto, metric: str) -> np.ndarray:
    """The filter metric of each sample.

    Args:
        batch: `token_level_scores` [B, T], and the extra values of the rewards.
        metric: `seq_reward` or `seq_final_reward`: the sum of a sample's scores; otherwise a number that the reward
            function returned. `score` is the score of a sample where the rewards have no extra value of that name.

    Returns:
        float64 [B], NaN for a sample whose scoring failed (`reward_error`).

    Raises:
        ValueError: no such column, or a sample has no finite number there.
    """
    assert batch.batch is not None
    failed = np.array([error is not None for error in batch.non_tensor_batch.get("reward_error", [None] * len(batch))])
    return np.where(failed, np.nan, _values(batch, metric, failed))


def _values(batch: DataProto, metric: str, failed: np.ndarray) -> np.ndarray:
    """The metric [B]; anything for samples that failed."""
    if metric in TOKEN_METRICS or (metric == "score" and metric not in batch.non_tensor_batch):
        # Groups are judged before a KL penalty is known, so that the final reward is the score.
        return batch.batch["token_level_scores"].double().sum(dim=-1).cpu().numpy()
    if metric not in batch.non_tensor_batch and failed.all():
        return np.zeros(len(batch))  # nothing was returned that could have had it
    if metric not in batch.non_tensor_batch:
        there = sorted(
            name for name, values in batch.non_tensor_batch.items() if len(values) and all(map(_is_number, values))
        )
        raise ValueError(
            f"{_ENABLE}.metric={metric}: a filter metric that no reward returns; "
            f"use one of {', '.join([*TOKEN_METRICS, *there])}, or return it from the reward function"
        )
    values = batch.non_tensor_batch[metric]
    missing = [value for value, error in zip(values, failed, strict=True) if not error and not _is_number(value)]
    if missing:
        raise ValueError(
            f"{_ENABLE}.metric={metric}: {len(missing)} of {len(values)} samples have no finite number there, one has "
            f"{missing[0]!r:.80}; return it with every sample, or use seq_reward"
        )
    return np.where(failed, 0.0, values).astype(np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_) and bool(np.isfinite(float(value)))


def keep_groups(uids: Sequence[Any], values: Sequence[float]) -> np.ndarray:
    """Which samples belong to a group that is kept: its values differ, or it is a single sample.

    Args:
        uids: [B] the group of each sample, in any order.
        values: [B] finite, or NaN for a sample that was not scored, which makes no difference.

    Returns:
        bool [B].

    Raises:
        ValueError: the two have different lengths.
    """
    groups, numbers_ = _groups(uids), np.asarray(values, np.float64)
    if len(groups) != len(numbers_):
        raise ValueError(f"keep_groups: {len(groups)} uids and {len(numbers_)} values; give one of each a sample")
    keep = np.zeros(len(groups), bool)
    for rows in _rows_of(groups).values():
        # Compared, since the standard deviation of equal values may be above 0 by rounding: three times 0.1.
        scored = _scored(numbers_[rows])
        keep[rows] = len(rows) == 1 or (len(scored) > 0 and scored.min() < scored.max())
    return keep


def _scored(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _groups(uids: Sequence[Any]) -> list[Any]:
    return uids.tolist() if isinstance(uids, np.ndarray) else list(uids)


def _rows_of(groups: Sequence[Any]) -> dict[Any, list[int]]:
    """Rows of each group, groups in the order of their first row."""
    rows: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


class GroupFilter:
    """Collects, for one step, the groups that are kept, over as many generation batches as it takes.

    `max_num_gen_batches` = 0 sets no limit: prompts may come round again in a later epoch. Still it ends when 64
    times `train_batch_size` prompts in a row (at least 256) gave not one group to keep, since then none will come.

    Groups beyond `train_batch_size` in the last batch are discarded, as upstream verl does: by the next step their
    tokens would be a policy older than its batch. `metrics` counts them.

    Args:
        config: `algorithm.filter_groups`; its `metric` is set.
        train_batch_size: prompts that the step needs.
        pad_token_id: what prompts and responses are padded with when batches of different widths are joined.
    """

    def __init__(self, config: FilterGroupsConfig, *, train_batch_size: int, pad_token_id: int) -> None:
        assert config.metric is not None and train_batch_size > 0
        self._metric, self._most_batches = config.metric, config.max_num_gen_batches
        self._needed, self._pad_token_id = train_batch_size, pad_token_id
        self._kept: list[DataProto] = []
        self._uids: set[Any] = set()
        self._num_batches = self._num_kept = self._num_unscored = self._barren = 0
        self._equal_at: Counter[float] = Counter()
        self._lowest, self._highest = np.inf, -np.inf

    @property
    def full(self) -> bool:
        """Whether there are enough groups for the step."""
        return self._num_kept >= self._needed

    def add(self, batch: DataProto) -> None:
        """Take the groups of one generation batch that are kept.

        Args:
            batch: rewarded samples with whole groups and `uid` [B], no uid of which was in an earlier batch.

        Raises:
            DynamicSamplingError: this was the last batch allowed and the step is not full.
            ValueError: see `group_values`; or an empty batch, or a uid that came before.
        """
        groups, values = _groups(batch.non_tensor_batch["uid"]), group_values(batch, self._metric)
        if not groups:
            raise ValueError("GroupFilter: got a generation batch without samples")
        if again := self._uids.intersection(groups):
            raise ValueError(f"GroupFilter: uid {min(again)!r} was in an earlier generation batch; make uids unique")
        self._uids.update(groups)
        self._num_batches += 1
        keep = keep_groups(groups, values)
        self._count(groups, values, keep)
        if keep.any():
            self._kept.append(batch[keep])
        if not self.full:
            self._check_limits()

    def _count(self, groups: Sequence[Any], values: np.ndarray, keep: np.ndarray) -> None:
        self._lowest = min(self._lowest, _scored(values).min(initial=np.inf))
        self._highest = max(self._highest, _scored(values).max(initial=-np.inf))
        for rows in _rows_of(groups).values():
            if keep[rows[0]]:
                self._num_kept, self._barren = self._num_kept + 1, 0
                continue
            self._barren += 1
            scored = _scored(values[rows])
            if len(scored):
                self._equal_at[float(scored[0])] += 1
            else:
                self._num_unscored += 1

    def _check_limits(self) -> None:
        if 0 < self._most_batches <= self._num_batches:
            raise DynamicSamplingError(
                f"{_ENABLE}.max_num_gen_batches={self._most_batches}: after {self._num_batches} generation batches "
                f"{self._summary()}. {self._advice()}, or raise max_num_gen_batches or data.gen_batch_size"
            )
        if not self._most_batches and self._barren >= max(_BARREN_PROMPTS, _BARREN_STEPS * self._needed):
            raise DynamicSamplingError(
                f"{_ENABLE}.enable=True: the last {self._barren} prompts in a row gave no group to keep; after "
                f"{self._num_batches} generation batches {self._summary()}. {self._advice()}"
            )

    def _summary(self) -> str:
        low, high, between = self._ends()
        unscored = f"; {self._num_unscored} groups could not be scored at all" if self._num_unscored else ""
        if not self._equal_at:
            return f"{self._num_kept} of the {self._needed} prompts that a step needs are there{unscored}"
        parts = [f"{low} with {self._metric} {self._lowest:g} for every sample"]
        if self._highest > self._lowest:
            parts.append(f"{high} with {self._highest:g} for every sample")
        if between:
            parts.append(f"{between} with another value for every sample")
        dropped = self._equal_at.total()
        return (
            f"{self._num_kept} of the {self._needed} prompts that a step needs are there; {dropped} of "
            f"{dropped + self._num_kept} groups were all-equal ({', '.join(parts)}){unscored}"
        )

    def _advice(self) -> str:
        low, high, between = self._ends()
        if self._num_unscored > self._equal_at.total():
            return "See why the reward function fails (the log has its traceback)"
        if low >= max(high, between):
            return (
                "Most of these get the lowest value: use easier prompts, more samples (actor_rollout_ref.rollout.n) or "
                "longer responses (data.max_response_length), and see that the reward can be reached at all"
            )
        if high >= between:
            return "Most of these get the highest value: use harder prompts or more samples (rollout.n)"
        return f"Use a metric that tells samples apart better than {self._metric}, or more samples (rollout.n)"

    def _ends(self) -> tuple[int, int, int]:
        """All-equal groups at the lowest value of the step, at the highest if that is another, and in between."""
        low = self._equal_at[self._lowest]
        high = self._equal_at[self._highest] if self._highest > self._lowest else 0
        return low, high, self._equal_at.total() - low - high

    def take(self) -> DataProto:
        """The first `train_batch_size` kept groups, each with its samples next to each other, in the order they came.

        Prompts and responses are as wide as the longest of them.

        Raises:
            ValueError: the step is not full yet.
        """
        if not self.full:
            raise ValueError(f"GroupFilter: {self._num_kept} of {self._needed} prompts are there; add a batch first")
        taken: list[DataProto] = []
        missing = self._needed
        for batch in self._kept:
            groups = list(_rows_of(_groups(batch.non_tensor_batch["uid"])).values())[:missing]
            if groups:
                taken.append(batch[[row for rows in groups for row in rows]])
            missing -= len(groups)
        return pad_and_concat(taken, self._pad_token_id)

    def metrics(self) -> dict[str, float]:
        """Counts of the step: generation batches, and groups kept, dropped (at which end) and left over."""
        low, high, _ = self._ends()
        return {
            "train/num_gen_batches": float(self._num_batches),
            "dynamic_sampling/kept_groups": float(self._num_kept),
            "dynamic_sampling/dropped_groups": float(self._equal_at.total() + self._num_unscored),
            "dynamic_sampling/dropped_groups_lowest": float(low),
            "dynamic_sampling/dropped_groups_highest": float(high),
            "dynamic_sampling/surplus_groups": float(max(0, self._num_kept - self._needed)),
        }
