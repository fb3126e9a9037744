"""The recorder of timelines: content of a file with one and with several writers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fixtures import trace_format
from verl.timeline import spans as timeline
from verl.timeline.reader import read_events, stage_seconds
from verl.timeline.spans import (
    close_timeline,
    current_timeline,
    join_timeline,
    open_timeline,
    publish_timeline,
    record,
    span,
    spanned,
)
from verl.utils.timing import add_stage, marked_timer


@pytest.fixture
def trace(tmp_path):
    open_timeline(tmp_path / "run" / "trace.json")
    yield tmp_path / "run" / "trace.json"
    close_timeline()


def events_of(path, *phases):
    events = trace_format.parse(path.read_text())
    trace_format.check(events)
    return [event for event in events if event["ph"] in phases] if phases else events


def child(code, timeline):
    """Start a process that joins `timeline`; it prints "ready" before it runs `code`."""
    prologue = "import sys, os, time; from verl.timeline.spans import *; "
    prologue += f"join_timeline({timeline!r}, sys.argv[1])\n"
    return lambda name: subprocess.Popen([sys.executable, "-c", prologue + code, name], stdout=subprocess.PIPE)


def test_spans_have_no_effect_without_a_timeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    join_timeline(None, "driver")
    timings = {}
    with span("a"), marked_timer("b", timings):
        record("c", "call", 0, 1)
    close_timeline()
    assert current_timeline() is None and timings["b"] > 0 and list(tmp_path.iterdir()) == []


def test_spans_are_written_when_they_end_and_the_closed_file_is_json(trace):
    before = time.monotonic_ns()
    with span("outer", "call", rows=3):
        with span("inner", "train"):
            pass
        assert [event["name"] for event in events_of(trace, "X")] == ["inner"]
    inner, outer = events_of(trace, "X")
    assert (outer["name"], outer["cat"], outer["args"]) == ("outer", "call", {"rows": 3})
    assert outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-3
    origin = current_timeline()["monotonic_ns"]
    assert before - origin <= outer["ts"] * 1000 <= time.monotonic_ns() - origin
    names = [event["args"]["name"] for event in events_of(trace, "M") if event["name"] == "process_name"]
    assert names == ["driver"]
    close_timeline()
    with span("late"):
        pass
    assert trace.read_text().startswith("[\n{") and trace.read_text().endswith("}\n]\n")
    assert "late" not in trace.read_text()


def test_a_block_that_raises_is_recorded(trace):
    with pytest.raises(KeyError), span("fails"):
        raise KeyError("x")
    assert [event["name"] for event in events_of(trace, "X")] == ["fails"]
    with span("next"):
        pass
    assert len({event["tid"] for event in events_of(trace, "X")}) == 1


def test_a_stage_and_its_seconds_use_the_same_clock_readings(trace):
    logged = {step: {} for step in (1, 2)}
    for step, timings in logged.items():
        with marked_timer("step", timings, step=step):
            for _ in range(2):
                with marked_timer("adv", timings):
                    pass
    # One that was generated ahead counts for its own step, one outside of all steps for none.
    add_stage("gen", logged[2], 5_000_000_000, 5_250_000_000, overlaps=True, step=2)
    add_stage("save", {}, 5_000_000_000, 6_000_000_000, overlaps=True)
    assert {event["cat"] for event in events_of(trace, "X", "b")} == {"stage"}
    assert [event["name"] for event in events_of(trace, "b")] == ["gen", "save"]
    recorded = stage_seconds(read_events(trace))
    assert sorted(recorded) == [1, 2] and logged[2]["gen"] == 0.25
    assert all(recorded[step] == pytest.approx(logged[step], rel=1e-6) for step in logged)


def test_concurrent_tasks_and_threads_have_separate_tracks(trace):
    async def both():
        entered = [asyncio.Event(), asyncio.Event()]

        async def work(own, other):
            with span("outer"):
                entered[own].set()
                await entered[other].wait()
                with span("inner"):
                    await asyncio.sleep(0)

        await asyncio.gather(work(0, 1), work(1, 0))

    asyncio.run(both())
    barrier = threading.Barrier(2)

    def run():
        with span("thread"):
            barrier.wait()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tracks = {name: [e["tid"] for e in events_of(trace, "X") if e["name"] == name] for name in ("outer", "thread")}
    assert sorted(tracks["outer"]) == sorted(tracks["thread"]) == [1, 2]  # used again once they are free
    titles = {e["tid"]: e["args"]["name"] for e in events_of(trace, "M") if e["name"] == "thread_name"}
    assert titles[1] == "main" and set(titles) == {1, 2}


def test_an_open_stage_keeps_its_track(trace):
    async def main():
        timings = {}

        async def beside():
            with marked_timer("beside", timings):
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        with marked_timer("step", timings):
            task = asyncio.create_task(beside())
            await asyncio.sleep(0)
        await task

    asyncio.run(main())
    assert len({event["tid"] for event in events_of(trace, "X")}) == 2


def test_overlapping_spans_become_event_pairs(trace):
    @spanned("request", "request", overlaps=True)
    async def request(gate):
        await gate.wait()
        return 7

    async def main():
        gate = asyncio.Event()
        tasks = [asyncio.create_task(request(gate)) for _ in range(5)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [7] * 5
    assert len(events_of(trace, "b")) == len(events_of(trace, "e")) == 5 and events_of(trace, "X") == []


def test_a_decorated_function_keeps_its_name_and_result(trace):
    @spanned("square", "train")
    def square(x):
        """Square x."""
        return x * x

    assert square(3) == 9 and square.__name__ == "square" and square.__doc__ == "Square x."
    assert asyncio.iscoroutinefunction(spanned("a")(asyncio.sleep)) and not asyncio.iscoroutinefunction(square)
    assert [(event["name"], event["cat"]) for event in events_of(trace, "X")] == [("square", "train")]


def test_many_processes_write_complete_lines_on_one_clock(trace):
    begin = time.monotonic_ns() - current_timeline()["monotonic_ns"]
    start = child("for i in range(2000):\n with span('work', rows=i): pass", current_timeline())
    processes = [start(f"rank {i}") for i in range(3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with span("last"):
        pass
    end = time.monotonic_ns() - current_timeline()["monotonic_ns"]
    events = events_of(trace)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {os.getpid(): "driver", **{p.pid: f"rank {i}" for i, p in enumerate(processes)}}
    for process in processes:
        rows = [event["args"]["rows"] for event in events if event["pid"] == process.pid and event["ph"] == "X"]
        assert rows == list(range(2000))
    assert events[-1]["name"] == "last"
    assert all(begin <= event["ts"] * 1000 <= end for event in events if event["ph"] == "X")


def test_a_killed_process_loses_only_its_open_spans(trace):
    code = "for i in range(3):\n with span('done', rows=i): pass\n"
    code += "with span('open'):\n print('ready', flush=True)\n time.sleep(600)"
    process = child(code, current_timeline())("victim")
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert [(event["name"], event["args"]) for event in events_of(trace, "X")] == [
        ("done", {"rows": i}) for i in range(3)
    ]


def test_an_existing_timeline_stays_until_the_run_has_begun(tmp_path):
    path = tmp_path / "trace.json"
    open_timeline(path)
    with span("first"):
        pass
    close_timeline()
    before = path.read_bytes()
    for attempt in ("fails", "begins"):
        timeline = open_timeline(path)
        with span(f"start, {attempt}"):
            pass
        assert path.read_bytes() == before
        if attempt == "begins":
            path.rename(tmp_path / "kept")
            publish_timeline(path)
            # A process that is restarted later has the name from before.
            process = child("with span('restarted'): pass", timeline)("replica 0")
            assert process.wait() == 0
            with span("step"):
                pass
        close_timeline()
        if attempt == "fails":
            starting = events_of(tmp_path / "trace.json.starting", "X")
            assert [event["name"] for event in starting] == ["start, fails"]
    assert [event["name"] for event in events_of(path, "X")] == ["start, begins", "restarted", "step"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept", "trace.json"]


def test_another_host_uses_the_wall_clock(tmp_path):
    now, wall = time.monotonic_ns(), time.time_ns()
    # The driver opened it 100 s ago by the wall clock; its own clock has nothing to do with ours.
    elsewhere = {
        "path": str(tmp_path / "t.json"),
        "host": "elsewhere",
        "monotonic_ns": 5,
        "wall_ns": wall - 100 * 10**9,
    }
    join_timeline(elsewhere, "rank 1")
    record("work", "call", now, now + 1000)
    close_timeline()
    (event,) = events_of(tmp_path / "t.json", "X")
    assert event["ts"] == pytest.approx(100e6, abs=50e3) and event["dur"] == 1.0


def test_a_full_disk_stops_the_recording_but_not_the_run(caplog):
    join_timeline({"path": "/dev/full", "host": timeline._host(), "monotonic_ns": 0, "wall_ns": 0}, "driver")
    with span("a"):
        pass
    close_timeline()
    assert len([r for r in caplog.records if "stops recording" in r.getMessage()]) == 1
