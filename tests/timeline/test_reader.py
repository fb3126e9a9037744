"""Shares and sums, from timelines written down by hand."""

import json
import sys

import pytest

from verl.timeline import reader as timeline_reader
from verl.timeline.reader import covered, read_events, stage_seconds, step_shares

DRIVER, RANK, ENGINE = 1, 2, 3


def complete(pid, category, name, begin, end, **args):
    times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
    return {"ph": "X", "pid": pid, "tid": 1, "cat": category, "name": name, "args": args, **times}


def process(pid, name):
    return {"ph": "M", "pid": pid, "tid": 1, "name": "process_name", "ts": 0, "args": {"name": name}}


# Seconds      0   1   2   3   4   5   6   7   8   9  10 |
# engine           [-------]   [---]                   [-|-]
# rank                                 [---]             |
#                                        [-----]         |
EVENTS = [
    process(DRIVER, "driver"),
    process(RANK, "trainer rank 0"),
    process(ENGINE, "replica 0 worker 0"),
    complete(DRIVER, "stage", "step", 0, 10, step=4),
    complete(DRIVER, "stage", "gen", 0.5, 5.5),
    complete(DRIVER, "stage", "gen", 5.5, 5.75),
    complete(DRIVER, "stage", "update_actor", 5.75, 9),
    # Generated ahead.
    {**complete(DRIVER, "stage", "gen", 8, 9.5, step=5), "ph": "b", "id": "1.1"},
    {**complete(DRIVER, "stage", "gen", 9.5, 9.5), "ph": "e", "id": "1.1"},
    complete(DRIVER, "stage", "step", 10, 12, step=5),
    complete(DRIVER, "stage", "save_checkpoint", 12, 14),
    complete(ENGINE, "engine", "forward", 1, 3),
    complete(ENGINE, "engine", "forward", 4, 5),
    complete(ENGINE, "engine", "forward", 9.5, 10.5),
    complete(RANK, "call", "update_actor", 5.75, 9),
    complete(RANK, "train", "forward", 6, 7),
    complete(RANK, "train", "backward", 6.5, 8),
    {"ph": "b", "pid": ENGINE, "tid": 1, "cat": "request", "name": "request", "id": "3.1", "ts": 0, "args": {}},
]


def test_step_shares():
    shares = step_shares(EVENTS)
    assert sorted(shares) == [4, 5]
    four, five = shares[4], shares[5]
    assert (four.seconds, four.engine, four.train) == pytest.approx((10, 0.35, 0.2))
    assert four.overhead == pytest.approx(0.45)
    assert four.busy == pytest.approx({"replica 0 worker 0": 0.35, "trainer rank 0": 0.2})
    assert (five.seconds, five.engine, five.train, five.overhead) == pytest.approx((2, 0.25, 0, 0.75))


def test_concurrent_engine_and_trainer_count_once():
    both = [*EVENTS, complete(ENGINE, "engine", "forward", 0, 10), complete(RANK, "train", "forward", 0, 10)]
    shares = step_shares(both)[4]
    assert (shares.engine, shares.train, shares.overhead) == pytest.approx((1, 1, 0))


def test_stage_seconds_add_up_to_the_step():
    seconds = stage_seconds(EVENTS)
    assert seconds[4] == pytest.approx({"step": 10, "gen": 5.25, "update_actor": 3.25})
    assert seconds[5] == pytest.approx({"step": 2, "gen": 1.5})
    assert sorted(seconds) == [4, 5]


@pytest.mark.parametrize(
    ("intervals", "length"),
    [
        ([], 0),
        ([(2, 3), (1, 2)], 2),
        ([(1, 5), (2, 3), (4, 6)], 5),
        ([(-5, 1), (9, 20)], 2),
        ([(-5, 20)], 10),
        ([(-5, -1), (11, 12)], 0),
    ],
)
def test_covered_length_of_intervals(intervals, length):
    assert covered(intervals, 0, 10) == length


def test_damaged_lines_are_skipped(tmp_path, caplog):
    path = tmp_path / "trace.json"
    lines = [json.dumps(event) for event in EVENTS]
    path.write_text("[\n" + ",\n".join(lines) + ',\n{"ph": "X", "na')
    assert read_events(path) == EVENTS
    assert f"line {len(lines) + 2} is damaged" in caplog.text
    caplog.clear()
    path.write_text(json.dumps(EVENTS[0]) + ",\n" + json.dumps(EVENTS[1]) + "\n]\n")
    assert read_events(path) == EVENTS[:2] and caplog.text == ""


def test_the_command_prints_one_line_per_step(tmp_path, capsys, monkeypatch):
    path = tmp_path / "trace.json"
    path.write_text("[\n" + "".join(json.dumps(event) + ",\n" for event in EVENTS))
    monkeypatch.setattr(sys, "argv", ["timeline_reader", str(path)])
    timeline_reader.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "step 4: 10.000 s, engine 35.0%, train 20.0%, overhead 45.0% (replica 0 worker 0 35%, trainer rank 0 20%)"
    )
    assert second.startswith("step 5: 2.000 s, engine 25.0%, train 0.0%, overhead 75.0%")


def test_a_large_file_is_read_at_its_start_and_its_end(tmp_path, caplog):
    path = tmp_path / "timeline.json"
    many = [complete(RANK, "train", "forward", second, second + 0.5) for second in range(100, 1100)]
    ahead = {**complete(DRIVER, "stage", "gen", 0.25, 0.25), "id": "1.2"}
    begin, end = {**ahead, "ph": "b"}, {**ahead, "ph": "e"}
    events = [*EVENTS[:3], *many[:500], begin, *many[500:], end, *EVENTS[3:]]
    path.write_text("[\n" + "".join(json.dumps(event) + ",\n" for event in events))
    assert read_events(path) == events
    read = read_events(path, at_most=16_000)
    assert read[:3] == EVENTS[:3]
    assert read[-len(EVENTS[2:]) :] == [end, *EVENTS[3:]]
    assert 50 < len(read) < 500
    assert caplog.text == ""  # no line was cut
    # The end of a pair whose beginning was not read is no span.
    assert begin not in read
    assert stage_seconds(read) == stage_seconds(EVENTS)
    assert step_shares(read)[4] == step_shares(EVENTS)[4]
