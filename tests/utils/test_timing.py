"""Stage timers."""

import time

import pytest

from verl.utils.timing import marked_timer


def test_a_name_accumulates_and_others_stay_apart():
    timings = {}
    for _ in range(2):
        with marked_timer("gen", timings):
            time.sleep(0.02)
    begin = time.perf_counter()
    with marked_timer("adv", timings):
        time.sleep(0.01)
    assert timings["gen"] >= 0.04
    assert 0.01 <= timings["adv"] <= time.perf_counter() - begin


def test_a_block_that_raises_is_timed():
    timings = {}
    with pytest.raises(KeyError), marked_timer("gen", timings):
        time.sleep(0.01)
        raise KeyError("x")
    assert timings["gen"] >= 0.01
