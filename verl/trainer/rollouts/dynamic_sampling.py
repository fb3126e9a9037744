"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): drop groups whose samples all have the same reward.

Such groups give no gradient. Further prompts are generated until the batch of the step is full of other groups:

    groups = GroupFilter(config.algorithm.filter_groups, train_batch_size=..., pad_token_id=...)
    while not groups.full:
        groups.add(<a generation batch>)
    batch = groups.build_batch()
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
# Give up after max(_MAX_DROPPED, _MAX_DROPPED_STEPS * train_batch_size) dropped prompts in a row.
_MAX_DROPPED_STEPS, _MAX_DROPPED = 64, 256


class DynamicSamplingError(RuntimeError):
    """The allowed generation batches held too few groups whose samples differ."""


def group_values(batch: DataProto, metric: str) -> np.ndarray:
    """Return the filter metric of each sample.

    Args:
        batch: columns `token_level_scores` [B, T], and the extra values of the rewards.
        metric: `seq_reward` or `seq_final_reward` for the sum of a sample's scores; otherwise the name of a number that
            the reward function returned. `score` is the sample's score if the rewards have no extra value `score`.

    Returns:
        float64 [B], NaN for a sample whose scoring failed (`reward_error`).

    Raises:
        ValueError: the column is missing, or a sample has no finite number in it.
    """
    assert batch.batch is not None
    failed = np.array([error is not None for error in batch.non_tensor_batch.get("reward_error", [None] * len(batch))])
    return np.where(failed, np.nan, _values(batch, metric, failed))


def _values(batch: DataProto, metric: str, failed: np.ndarray) -> np.ndarray:
    """Return the metric [B]; the values of failed samples are arbitrary."""
    if metric in TOKEN_METRICS or (metric == "score" and metric not in batch.non_tensor_batch):
        # Groups are filtered before the KL penalty is known, so the final reward is the score.
        return batch.batch["token_level_scores"].double().sum(dim=-1).cpu().numpy()
    if metric not in batch.non_tensor_batch and failed.all():
        return np.zeros(len(batch))  # no reward was returned, so the column cannot exist
    if metric not in batch.non_tensor_batch:
        available = sorted(
            name for name, values in batch.non_tensor_batch.items() if len(values) and all(map(_is_number, values))
        )
        raise ValueError(
            f"{_ENABLE}.metric={metric}: no reward returns this filter metric; "
            f"use one of {', '.join([*TOKEN_METRICS, *available])}, or return it from the reward function"
        )
    values = batch.non_tensor_batch[metric]
    missing = [value for value, error in zip(values, failed, strict=True) if not error and not _is_number(value)]
    if missing:
        raise ValueError(
            f"{_ENABLE}.metric={metric}: {len(missing)} of {len(values)} samples have no finite number there, for "
            f"example {missing[0]!r:.80}; return a number for every sample, or use seq_reward"
        )
    return np.where(failed, 0.0, values).astype(np.float64)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_) and bool(np.isfinite(float(value)))


def keep_groups(uids: Sequence[Any] | np.ndarray, values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Select the samples of the groups to keep: groups whose values differ, and groups of a single sample.

    Args:
        uids: [B] group of each sample, in any order.
        values: [B] finite, or NaN for a sample that was not scored; NaN values are ignored.

    Returns:
        bool [B], True for a sample of a group to keep.

    Raises:
        ValueError: `uids` and `values` have different lengths.
    """
    groups, scores = _as_list(uids), np.asarray(values, np.float64)
    if len(groups) != len(scores):
        raise ValueError(f"keep_groups: {len(groups)} uids and {len(scores)} values; pass one of each per sample")
    keep = np.zeros(len(groups), bool)
    for rows in _rows_of(groups).values():
        # Not the standard deviation: rounding may make it positive for equal values such as 0.1, 0.1, 0.1.
        scored = _scored(scores[rows])
        keep[rows] = len(rows) == 1 or (len(scored) > 0 and scored.min() < scored.max())
    return keep


def _scored(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _as_list(uids: Sequence[Any] | np.ndarray) -> list[Any]:
    return uids.tolist() if isinstance(uids, np.ndarray) else list(uids)


def _rows_of(groups: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the rows of each group; groups are in the order of their first row."""
    rows: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    return rows


class GroupFilter:
    """Collects the groups to keep for one step, from as many generation batches as necessary.

    `max_num_gen_batches` = 0 sets no limit: prompts may be drawn again in a later epoch. Collecting still fails if
    64 * `train_batch_size` prompts in a row (at least 256) gave no group to keep, because then none can be expected.

    Groups beyond `train_batch_size` in the last batch are discarded, as in upstream verl: in the next step their tokens
    would come from an older policy than the rest of its batch. `metrics` counts them.

    Args:
        config: `algorithm.filter_groups`, with `metric` set.
        train_batch_size: prompts that the step needs.
        pad_token_id: padding of prompts and responses when batches of different widths are joined.
    """

    def __init__(self, config: FilterGroupsConfig, *, train_batch_size: int, pad_token_id: int) -> None:
        assert config.metric is not None and train_batch_size > 0
        self._metric, self._most_batches = config.metric, config.max_num_gen_batches
        self._needed, self._pad_token_id = train_batch_size, pad_token_id
        self._kept: list[DataProto] = []
        self._uids: set[Any] = set()
        self._num_batches = self._num_kept = self._num_unscored = self._dropped_run = 0
        self._equal_at: Counter[float] = Counter()
        self._lowest, self._highest = np.inf, -np.inf

    @property
    def full(self) -> bool:
        """True if there are enough groups for the step."""
        return self._num_kept >= self._needed

    def add(self, batch: DataProto) -> None:
        """Add the groups to keep of one generation batch.

        Args:
            batch: scored samples of complete groups, with `uid` [B]; no uid may occur in an earlier batch.

        Raises:
            DynamicSamplingError: this was the last allowed batch and the step is not full.
            ValueError: see `group_values`; or the batch is empty, or a uid occurred before.
        """
        groups, values = _as_list(batch.non_tensor_batch["uid"]), group_values(batch, self._metric)
        if not groups:
            raise ValueError("GroupFilter: the generation batch has no samples")
        if repeated := self._uids.intersection(groups):
            raise ValueError(
                f"GroupFilter: duplicate uid {min(repeated)!r} in a later generation batch; make uids unique"
            )
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
                self._num_kept, self._dropped_run = self._num_kept + 1, 0
                continue
            self._dropped_run += 1
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
        if not self._most_batches and self._dropped_run >= max(_MAX_DROPPED, _MAX_DROPPED_STEPS * self._needed):
            raise DynamicSamplingError(
                f"{_ENABLE}.enable=True: the last {self._dropped_run} prompts in a row gave no group to keep; after "
                f"{self._num_batches} generation batches {self._summary()}. {self._advice()}"
            )

    def _summary(self) -> str:
        low, high, between = self._ends()
        unscored = f"; {self._num_unscored} groups could not be scored at all" if self._num_unscored else ""
        if not self._equal_at:
            return f"{self._num_kept} of the {self._needed} prompts that a step needs are collected{unscored}"
        parts = [f"{low} with {self._metric} {self._lowest:g} for every sample"]
        if self._highest > self._lowest:
            parts.append(f"{high} with {self._highest:g} for every sample")
        if between:
            parts.append(f"{between} with another value, the same for every sample")
        dropped = self._equal_at.total()
        return (
            f"{self._num_kept} of the {self._needed} prompts that a step needs are collected; {dropped} of "
            f"{dropped + self._num_kept} groups were all-equal ({', '.join(parts)}){unscored}"
        )

    def _advice(self) -> str:
        low, high, between = self._ends()
        if self._num_unscored > self._equal_at.total():
            return "Find out why the reward function fails (the log has its traceback)"
        if low >= max(high, between):
            return (
                "Most of these get the lowest value: use easier prompts, more samples (actor_rollout_ref.rollout.n) or "
                "longer responses (data.max_response_length), and check that the reward can be reached"
            )
        if high >= between:
            return "Most of these get the highest value: use harder prompts or more samples (rollout.n)"
        return f"Use a metric that separates samples better than {self._metric}, or more samples (rollout.n)"

    def _ends(self) -> tuple[int, int, int]:
        """Count the dropped groups at the lowest value of the step, at the highest if it differs, and in between."""
        low = self._equal_at[self._lowest]
        high = self._equal_at[self._highest] if self._highest > self._lowest else 0
        return low, high, self._equal_at.total() - low - high

    def build_batch(self) -> DataProto:
        """Return the first `train_batch_size` kept groups in order of arrival, the samples of each next to each other.

        Prompts and responses are padded to the longest of them.

        Raises:
            ValueError: the step is not full yet.
        """
        if not self.full:
            raise ValueError(
                f"GroupFilter: {self._num_kept} of {self._needed} prompts are collected; add a batch first"
            )
        parts: list[DataProto] = []
        missing = self._needed
        for batch in self._kept:
            groups = list(_rows_of(_as_list(batch.non_tensor_batch["uid"])).values())[:missing]
            if groups:
                parts.append(batch[[row for rows in groups for row in rows]])
            missing -= len(groups)
        return pad_and_concat(parts, self._pad_token_id)

    def metrics(self) -> dict[str, float]:
        """Return the counts of the step: generation batches, and groups kept, dropped and left over."""
        low, high, _ = self._ends()
        return {
            "train/num_gen_batches": float(self._num_batches),
            "dynamic_sampling/kept_groups": float(self._num_kept),
            "dynamic_sampling/dropped_groups": float(self._equal_at.total() + self._num_unscored),
            "dynamic_sampling/dropped_groups_lowest": float(low),
            "dynamic_sampling/dropped_groups_highest": float(high),
            "dynamic_sampling/surplus_groups": float(max(0, self._num_kept - self._needed)),
        }
