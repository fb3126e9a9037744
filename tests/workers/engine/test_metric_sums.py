"""Metrics that only some micro-batches or ranks have."""

import pytest

from fixtures.engine_cases import uneven_metrics_program
from fixtures.ranks import run_ranks


def test_ranks_with_other_metrics_are_reduced_by_name():
    """The names of the ranks differ in number and in order, so that values paired by position would be wrong."""
    by_rank = [
        [{"both": 1.0, "mean": (6.0, 0.5)}, {"both": 2.0, "zero": 0.0}],
        [{"a_other": 8.0, "both": 4.0, "other_mean": (3.0, 0.25), "mean": (1.0, 0.25)}],
    ]
    expected = {"a_other": 8.0, "both": 7.0, "mean": 7.0 / 0.75, "other_mean": 12.0, "zero": 0.0}
    assert run_ranks(2, uneven_metrics_program, by_rank) == [expected, expected]


def test_a_rank_without_metrics_takes_part():
    assert run_ranks(2, uneven_metrics_program, [[], [{"x": 3.0}]]) == [{"x": 3.0}] * 2


def test_a_mean_without_weight_is_left_out():
    assert run_ranks(1, uneven_metrics_program, [[{"x": 3.0, "empty": (0.0, 0.0)}]]) == [{"x": 3.0}]


def test_shares_of_a_mean_and_of_a_sum_add_up():
    """The metric is a number in one micro-batch, e.g. 0.0 where there is nothing to count, and a tensor in others."""
    by_rank = [[{"x": (0.0, 0.5)}], [{"x": 3.0}]]
    assert run_ranks(2, uneven_metrics_program, by_rank) == [{"x": pytest.approx(3.0)}] * 2
