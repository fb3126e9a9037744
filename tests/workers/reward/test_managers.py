"""Reward managers as pure functions."""

import math
from types import SimpleNamespace

import pytest

from verl.config.reward_kwargs import OverlongBuffer
from verl.workers.reward.managers import (
    ComponentError,
    DapoManager,
    GdpoManager,
    NaiveManager,
    make_manager,
    overlong_penalty,
)


def paper_penalty(length, longest, cache):
    """arXiv 2503.14476, equation 13, as its three cases."""
    if length <= longest - cache:
        return 0.0
    if length <= longest:
        return ((longest - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize(("longest", "cache"), [(20480, 4096), (10, 4), (10, 10), (1, 1), (7, 3)])
def test_the_penalty_equals_the_papers_up_to_the_limit(longest, cache):
    buffer = OverlongBuffer(longest, cache, 1.0, False)
    lengths = {0, 1, longest - cache, longest - cache + 1, longest - 1, longest, *range(0, longest, 1 + longest // 50)}
    for length in lengths:
        assert overlong_penalty(length, buffer) == pytest.approx(paper_penalty(length, longest, cache), abs=1e-15)


def test_the_penalty_keeps_falling_beyond_the_limit():
    assert overlong_penalty(14, OverlongBuffer(10, 4, 0.5, False)) == -1.0


def test_the_score_may_become_negative_and_given_extras_are_not_modified():
    extra = {"acc": 0.0}
    reward, more = DapoManager(OverlongBuffer(10, 4, 2.0, False)).reward(0.25, extra, 9)
    assert (reward, more, extra) == (-1.25, {"acc": 0.0, "score": 0.25}, {"acc": 0.0})


def test_dapo_without_a_buffer_equals_naive():
    extra = {"acc": 1.0}
    for manager in (NaiveManager(), DapoManager(None)):
        assert manager.reward(0.5, extra, None) == (0.5, {"acc": 1.0})


def test_gdpo_components_must_be_finite_numbers():
    manager = GdpoManager(("score", "form"))
    assert manager.reward(0.5, {"form": True, "note": "x"}, 3) == (0.5, {"score": 0.5, "form": 1.0, "note": "x"})
    for bad in ("1", None, math.nan, math.inf, [1.0]):
        with pytest.raises(ComponentError, match=r"form=.*finite number"):
            manager.reward(0.5, {"form": bad}, 3)
    with pytest.raises(ComponentError, match="no a, b for a sample"):
        GdpoManager(("a", "score", "b")).reward(0.5, {}, 3)


def test_make_manager_uses_its_section():
    kwargs = {"max_resp_len": 10, "overlong_buffer_cfg": {"enable": True, "len": 4}}
    section = SimpleNamespace(reward_manager=SimpleNamespace(name="dapo"), reward_kwargs=kwargs)
    assert make_manager(section) == DapoManager(OverlongBuffer(10, 4, 1.0, False))
    section.reward_kwargs = None
    assert make_manager(section) == DapoManager(None)
    section.reward_manager.name = "gdpo"
    assert make_manager(section, ["a"]) == GdpoManager(("a",))
