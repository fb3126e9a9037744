"""Balanced partitions: every index once, sizes, and equality of the sums."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.utils.seqlen_balancing import balanced_partition


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9), st.booleans())
def test_parts_hold_every_index_once_and_have_equal_sizes(lengths, k, equal_size):
    parts = balanced_partition(lengths, k, equal_size)
    assert len(parts) == k
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in parts)
    if equal_size:
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1


def test_partition_of_a_case_that_greedy_does_not_solve():
    """Largest-first divides 8 7 6 5 4 into sums 16 and 14, as differencing with any sizes does; the best is 15 15."""
    parts = balanced_partition([8, 7, 6, 5, 4], 2, equal_size=False)
    sums = [sum([8, 7, 6, 5, 4][i] for i in part) for part in parts]
    assert max(sums) <= 16
    parts = balanced_partition([4, 5, 6, 7, 8, 9], 3)
    assert [sum([4, 5, 6, 7, 8, 9][i] for i in part) for part in parts] == [13, 13, 13]


@pytest.mark.parametrize("k", [2, 3, 8])
def test_sums_of_ragged_lengths_are_similar(k):
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(6, 1)) + 1 for _ in range(512)]
    sums = [sum(lengths[i] for i in part) for part in balanced_partition(lengths, k)]
    in_order = [sum(lengths[r::k]) for r in range(k)]
    assert max(sums) - min(sums) < 0.02 * sum(lengths) / k
    assert max(sums) - min(sums) < max(in_order) - min(in_order)


def test_partition_is_deterministic_and_fast():
    rng = random.Random(1)
    lengths = [rng.randrange(1, 4096) for _ in range(4096)]
    started = time.process_time()
    first = balanced_partition(lengths, 8)
    assert time.process_time() - started < 2.0
    assert first == balanced_partition(lengths, 8)


def test_zero_parts_is_an_error():
    with pytest.raises(ValueError, match="k=0"):
        balanced_partition([1, 2], 0)
