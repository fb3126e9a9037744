"""Dynamic sampling: the groups to keep, and collecting them until a step's batch is full."""

import itertools
import random

import numpy as np
import pytest
import torch

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.config import FilterGroupsConfig
from verl.trainer.rollouts.dynamic_sampling import DynamicSamplingError, GroupFilter, group_values, keep_groups
from verl.workers.reward import RewardResult

PAD = 0


def batch_of(groups, *, widths=None, extras=None):
    """Build one sample per score; `groups` = {uid: scores}; `widths` = {uid: (prompt, response) lengths}."""
    samples = []
    for uid, scores in groups.items():
        prompt, response = (widths or {}).get(uid, (2, 3))
        for i, score in enumerate(scores):
            row = {"uid": uid, "data_source": "d", "reward_model": {}, "raw_prompt": []}
            output = AgentLoopOutput([1] * prompt, [2] * response, [1] * response)
            extra = {name: values[uid][i] for name, values in (extras or {}).items() if values[uid][i] is not ...}
            samples.append(ScoredSample(row, output, RewardResult(float(score), extra, None, 0.0)))
    return to_batch(samples, pad_token_id=PAD, with_log_probs=False)


# ---- groups to keep ----


def reference_keep(uids, values):
    """Return the rule of the paper: a group is dropped if all its values are equal, a single sample is kept."""
    kept = []
    for uid in uids:
        mine = [value for other, value in zip(uids, values, strict=True) if other == uid]
        kept.append(len(mine) == 1 or any(value != mine[0] for value in mine))
    return kept


@pytest.mark.parametrize(
    ("uids", "values", "expected"),
    [
        ("aabb", [0, 1, 1, 1], [True, True, False, False]),
        ("abab", [0, 1, 1, 1], [True, False, True, False]),  # groups need not be adjacent
        ("abc", [0, 0, 0], [True, True, True]),  # single samples
        ("aaa", [0.1, 0.1, 0.1], [False] * 3),  # whose standard deviation is 1.4e-17
        ("aaa", [1e-300, 1e-300, 2e-300], [True] * 3),  # whose standard deviation underflows to 0
        ("aa", [-0.0, 0.0], [False] * 2),
        ("aab", [1e30, -1e30, 5], [True] * 3),
        ("", [], []),
    ],
)
def test_groups_with_equal_values_are_dropped(uids, values, expected):
    keep = keep_groups(np.array(list(uids), dtype=object), np.array(values, dtype=np.float64))
    assert keep.dtype == bool
    assert keep.tolist() == expected == reference_keep(uids, values)


def test_kept_groups_match_the_reference_on_random_values():
    generator = random.Random(3)
    for _ in range(200):
        size = generator.randrange(12)
        uids = [generator.choice("abcde") for _ in range(size)]
        values = [generator.choice([0.0, 1.0, 0.1]) for _ in range(size)]
        assert keep_groups(uids, values).tolist() == reference_keep(uids, values)


def test_uids_and_values_of_different_lengths_are_rejected():
    with pytest.raises(ValueError, match="2 uids and 3 values"):
        keep_groups(["a", "b"], [1, 2, 3])


# ---- the metric ----


def test_token_level_metrics_are_sums_over_the_response():
    batch = batch_of({"a": [0.5, -2.0], "b": [1.0]}, widths={"b": (1, 0)})
    assert group_values(batch, "seq_reward").tolist() == [0.5, -2.0, 1.0]  # also of an empty response
    assert group_values(batch, "seq_final_reward").tolist() == [0.5, -2.0, 1.0]


def test_small_differences_between_token_scores_are_not_lost():
    batch = batch_of({"a": [0.0, 0.0]})
    batch.batch["token_level_scores"] = torch.tensor([[1e8, 1.0, 0.0], [1e8, 2.0, 0.0]])
    assert keep_groups(["a", "a"], group_values(batch, "seq_reward")).all()


def test_the_metric_may_be_a_number_of_the_reward_function():
    batch = batch_of({"a": [1, 1], "b": [0, 0]}, extras={"acc": {"a": [True, False], "b": [0.5, np.float32(0.25)]}})
    values = group_values(batch, "acc")
    assert (values.dtype, values.tolist()) == (np.float64, [1.0, 0.0, 0.5, 0.25])


def test_score_is_the_extra_value_if_the_manager_adds_one():
    assert group_values(batch_of({"a": [0.5, 1.0]}), "score").tolist() == [0.5, 1.0]
    batch = batch_of({"a": [0.5, 1.0]}, extras={"score": {"a": [0.75, 1.0]}})
    assert group_values(batch, "score").tolist() == [0.75, 1.0]


def test_a_metric_that_no_reward_returns_is_rejected():
    batch = batch_of({"a": [1, 1]}, extras={"acc": {"a": [1.0, 0.0]}, "pred": {"a": ["4", "5"]}})
    with pytest.raises(
        ValueError, match=r"metric=accuracy: no reward returns .*; use one of seq_reward, .*acc"
    ) as caught:
        group_values(batch, "accuracy")
    assert "pred" not in str(caught.value)
    with pytest.raises(ValueError, match=r"metric=pred: 2 of 2 samples have no finite number there, for example '4'"):
        group_values(batch, "pred")


@pytest.mark.parametrize("value", [..., None, float("nan"), float("inf")])
def test_a_metric_that_a_sample_lacks_is_rejected(value):
    batch = batch_of({"a": [1, 1]}, extras={"acc": {"a": [1.0, value]}})
    with pytest.raises(ValueError, match="metric=acc: 1 of 2 samples"):
        group_values(batch, "acc")


# ---- collecting until the batch is full ----


def group_filter(needed, limit=0, metric="seq_reward"):
    config = FilterGroupsConfig(enable=True, metric=metric, max_num_gen_batches=limit)
    return GroupFilter(config, train_batch_size=needed, pad_token_id=PAD)


def test_groups_are_collected_over_batches_and_the_surplus_is_discarded():
    groups = group_filter(3)
    groups.add(batch_of({"a": [0, 0], "b": [0, 1], "c": [1, 1]}, widths={"c": (9, 9)}))
    assert not groups.full
    with pytest.raises(ValueError, match="1 of 3 prompts"):
        groups.build_batch()
    groups.add(batch_of({"d": [0, 0], "e": [0, 0], "f": [1, 1]}))  # a batch without a group to keep
    groups.add(batch_of({"g": [1, 0], "h": [1, 0], "i": [0, 1]}, widths={"g": (4, 1), "h": (1, 5), "i": (8, 8)}))
    assert groups.full
    batch = groups.build_batch()
    assert batch.non_tensor_batch["uid"].tolist() == ["b", "b", "g", "g", "h", "h"]
    assert batch.batch["token_level_scores"].sum(-1).tolist() == [0, 1, 1, 0, 1, 0]
    # As wide as the longest kept group: neither the dropped c nor the surplus i counts.
    assert batch.batch["prompts"].shape == (6, 4)
    assert batch.batch["responses"].shape == (6, 5)
    assert batch.batch["input_ids"].tolist()[2] == [1, 1, 1, 1, 2, 0, 0, 0, 0]
    assert groups.metrics() == {
        "train/num_gen_batches": 3.0,
        "dynamic_sampling/kept_groups": 4.0,
        "dynamic_sampling/dropped_groups": 5.0,
        "dynamic_sampling/dropped_groups_lowest": 3.0,
        "dynamic_sampling/dropped_groups_highest": 2.0,
        "dynamic_sampling/surplus_groups": 1.0,
    }


def test_samples_of_a_group_become_adjacent_and_single_samples_are_kept():
    batch = batch_of({"a": [0, 1], "b": [2, 3], "c": [1]})[[0, 2, 4, 1, 3]]
    groups = group_filter(3)
    groups.add(batch)
    assert groups.build_batch().non_tensor_batch["uid"].tolist() == ["a", "a", "b", "b", "c"]


def test_the_last_allowed_batch_may_fill_the_step():
    groups = group_filter(2, limit=2)
    groups.add(batch_of({"a": [0, 1]}))
    groups.add(batch_of({"b": [0, 1]}))
    assert groups.full


@pytest.mark.parametrize(
    ("dropped", "parts"),
    [
        ({"b": [0, 0], "c": [0, 0], "d": [1, 1]}, ("2 with seq_reward 0", "1 with 1", "easier prompts")),
        ({"b": [0, 0], "c": [1, 1], "d": [1, 1]}, ("1 with seq_reward 0", "2 with 1", "harder prompts")),
        ({"b": [0.5, 0.5], "c": [0.25, 0.25]}, ("0 with seq_reward 0", "2 with another value", "separates samples")),
    ],
)
def test_too_few_groups_within_the_allowed_batches_are_an_error(dropped, parts):
    groups = group_filter(3, limit=2)
    groups.add(batch_of({"a": [0, 1]}))
    with pytest.raises(DynamicSamplingError) as caught:
        groups.add(batch_of(dropped))
    text = str(caught.value)
    total = f"{len(dropped)} of {len(dropped) + 1} groups were all-equal"
    for part in ("max_num_gen_batches=2: after 2 generation", "1 of the 3 prompts", total, "gen_batch_size", *parts):
        assert part in text, text


def test_a_constant_reward_counts_as_lowest_only():
    groups = group_filter(1, limit=1)
    with pytest.raises(DynamicSamplingError, match=r"\(2 with seq_reward -1 for every sample\)"):
        groups.add(batch_of({"a": [-1, -1], "b": [-1, -1]}))
    assert groups.metrics()["dynamic_sampling/dropped_groups_highest"] == 0.0


def test_without_a_limit_too_many_dropped_prompts_in_a_row_are_an_error():
    groups, number = group_filter(2), itertools.count()
    equal = lambda size: batch_of({str(next(number)): [0, 0] for _ in range(size)})  # noqa: E731
    groups.add(equal(255))
    groups.add(batch_of({"x": [0, 1]}))  # the count starts again
    groups.add(equal(255))
    with pytest.raises(DynamicSamplingError, match=r"last 256 prompts in a row.*511 of 512 groups"):
        groups.add(equal(1))
    large = group_filter(5)
    large.add(equal(319))
    with pytest.raises(DynamicSamplingError, match="last 320 prompts"):
        large.add(equal(1))


def test_a_repeated_uid_and_an_empty_batch_are_rejected():
    groups = group_filter(3)
    groups.add(batch_of({"a": [0, 1], "b": [0, 0]}))
    with pytest.raises(ValueError, match="duplicate uid 'b' in a later generation batch"):
        groups.add(batch_of({"b": [0, 1]}))
    with pytest.raises(ValueError, match="has no samples"):
        groups.add(batch_of({"c": [0, 1]})[[]])


def test_batches_with_different_extra_values_are_joined():
    groups = group_filter(2)
    groups.add(batch_of({"a": [0, 1]}, extras={"acc": {"a": [0.0, 1.0]}}))
    groups.add(batch_of({"b": [0, 1]}))
    assert groups.build_batch().non_tensor_batch["acc"].tolist() == [0.0, 1.0, None, None]


# ---- samples whose scoring failed -----------------------------------------------------------------------------------


def with_errors(batch, failed):
    """Mark samples of `batch` as failed: score 0, and the kind of the error in a column."""
    errors = np.array(["timeout" if i in failed else None for i in range(len(batch))], dtype=object)
    batch.non_tensor_batch["reward_error"] = errors
    for i in failed:
        batch.batch["token_level_scores"][i] = 0.0
    return batch


def test_a_failed_score_is_ignored_within_a_group():
    values = np.array([1.0, 1.0, np.nan, 1.0, 0.0, np.nan, np.nan, np.nan])
    uids = ["a"] * 3 + ["b"] * 3 + ["c"] * 2
    assert keep_groups(uids, values).tolist() == [False] * 3 + [True] * 3 + [False] * 2


@pytest.mark.parametrize("metric", ["seq_reward", "acc"])
def test_a_failed_sample_has_no_value(metric):
    batch = with_errors(batch_of({"a": [1, 1], "b": [0]}, extras={"acc": {"a": [1.0, ...], "b": [0.0]}}), failed={1})
    np.testing.assert_array_equal(group_values(batch, metric), [1.0, np.nan, 0.0])


def test_a_draw_without_scores_does_not_end_the_run():
    groups = GroupFilter(FilterGroupsConfig(enable=True, metric="acc"), train_batch_size=1, pad_token_id=0)
    groups.add(with_errors(batch_of({"a": [0, 0]}), failed={0, 1}))
    assert not groups.full
    groups.add(batch_of({"b": [1, 0]}, extras={"acc": {"b": [1.0, 0.0]}}))
    assert groups.build_batch().non_tensor_batch["uid"].tolist() == ["b", "b"]
    assert groups.metrics()["dynamic_sampling/dropped_groups"] == 1.0


def test_the_error_reports_failed_scores():
    config = FilterGroupsConfig(enable=True, metric="seq_reward", max_num_gen_batches=1)
    groups = GroupFilter(config, train_batch_size=1, pad_token_id=0)
    with pytest.raises(DynamicSamplingError, match=r"1 groups could not be scored at all.*Find out why the reward"):
        groups.add(with_errors(batch_of({"a": [0, 0]}), failed={0, 1}))
