"""Counts of stale samples, and the fractions of a step in which one side waited."""

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.ppo.async_metrics import AsyncCounts, idle_metrics


def test_stale_samples_and_spans_are_counted_over_the_steps():
    # Version 5 trains: fresh, mixed, stale, stale and mixed, empty.
    versions = torch.tensor([[5, 5, -1], [4, 5, 5], [4, 4, 4], [2, -1, 4], [-1, -1, -1]])
    uids = np.array(["a", "a", "b", "b", "c"], object)
    batch = DataProto.from_dict({"weight_versions": versions}, {"uid": uids})
    counts = AsyncCounts()
    first, second = counts.metrics(batch, 5), counts.metrics(batch, 5)
    assert first == {
        "fully_async/count/current_param_version": 5.0,
        "fully_async/count/stale_trajectory_processed": 2.0,
        "fully_async/count/stale_samples_processed": 1.0,
        "fully_async/partial/total_partial_num": 2.0,
        "fully_async/partial/partial_ratio": 2 / 5,
        "fully_async/partial/max_partial_span": 2.0,
    }
    assert second["fully_async/count/stale_trajectory_processed"] == 4
    assert second["fully_async/count/stale_samples_processed"] == 2


def test_idle_ratios_are_fractions_of_the_step():
    metrics = idle_metrics({"step": 8.0, "wait_for_rollout": 2.0, "wait_for_trainer": 6.0})
    assert metrics == {
        "fully_async/trainer/idle_ratio": 0.25,
        "fully_async/rollouter/idle_ratio": 0.75,
        "fully_async/rollouter/active_time": 2.0,
        "fully_async/rollouter/version_time": 8.0,
    }
    # The replicas may also have been idle between two steps.
    assert idle_metrics({"step": 4.0, "wait_for_trainer": 6.0})["fully_async/rollouter/idle_ratio"] == pytest.approx(1)
