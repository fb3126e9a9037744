"""Stage timers, under a clock that the test sets."""

from types import SimpleNamespace

import pytest

from verl.utils import timing
from verl.utils.timing import marked_timer


class Clock:
    """A clock in nanoseconds that moves only by `advance`."""

    def __init__(self):
        self.now_ns = 1_000

    def advance(self, seconds):
        self.now_ns += round(seconds * 1e9)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(monotonic_ns=lambda: clock.now_ns))
    return clock


def test_a_repeated_name_accumulates_and_other_names_stay_separate(clock):
    timings = {}
    for _ in range(2):
        with marked_timer("gen", timings):
            clock.advance(0.02)
    clock.advance(5)  # in no stage
    with marked_timer("adv", timings):
        clock.advance(0.01)
    assert timings == pytest.approx({"gen": 0.04, "adv": 0.01}, rel=1e-12)


def test_a_block_that_raises_is_timed(clock):
    timings = {}
    with pytest.raises(KeyError), marked_timer("gen", timings):
        clock.advance(0.01)
        raise KeyError("x")
    assert timings == pytest.approx({"gen": 0.01}, rel=1e-12)
