"""Records what each process does when, as one Chrome/Perfetto trace per run (JSON array of trace events).

    with span("forward", "train", rows=8): ...      # nothing at all unless this process takes part in a timeline

The driver opens the file (`open_timeline`) and hands the plain dict that names it to its processes, which join
(`join_timeline`). A span is written when it ends, as one line appended by one system call: nothing is kept in memory,
nothing is collected, and a process that is killed loses only the spans that were open. The array needs no closing
bracket, so the trace of a broken run opens like any other. Appending is whole on a local file system; on a network file
system lines of two processes may mix, and `timeline_reader` leaves such lines out.

Times are the kernel's monotonic clock, which all processes of a host share, in microseconds since the driver opened the
timeline. A process on another host knows no such clock: it goes by the wall clocks, as exact as these agree (NTP:
about a millisecond), and writes to the same path there.

Spans that one thread or asyncio task opens lie on one track and nest; tasks that run at the same time get tracks of
their own. Spans with `overlaps=True`, of which there may be thousands at once, become asynchronous events instead.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_recorder: _Recorder | None = None


def open_timeline(path: str | Path) -> dict[str, Any]:
    """Begin the timeline of a run, with this process as its driver; a file that is there becomes PATH.previous.

    Returns:
        What `join_timeline` takes, in plain strings and numbers.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, path.with_name(path.name + ".previous"))
    timeline = {"path": str(path), "host": _host(), "monotonic_ns": time.monotonic_ns(), "wall_ns": time.time_ns()}
    join_timeline(timeline, "driver")
    return timeline


def join_timeline(timeline: dict[str, Any] | None, process: str) -> None:
    """Record this process's spans under the name `process` from now on; None, for a run without timeline, does nothing.

    A process that has joined keeps its first name: an engine may run its workers in its own process.
    """
    global _recorder
    if timeline is not None and (_recorder is None or _recorder.pid != os.getpid()):
        _recorder = _Recorder(timeline, process)


def current_timeline() -> dict[str, Any] | None:
    """What this process joined, to hand on to its own processes; None without a timeline."""
    return None if _recorder is None else _recorder.timeline


def close_timeline() -> None:
    """End the array, once no other process writes any more; this process stops recording."""
    global _recorder
    if _recorder is not None:
        _recorder.end()
        _recorder = None


@contextmanager
def span(name: str, category: str = "call", *, overlaps: bool = False, **args: Any) -> Iterator[None]:
    """Record the block, whether it raises or not.

    Args:
        name: what the block does.
        category: what it counts as; `timeline_reader` knows `stage`, `engine` and `train`.
        overlaps: many of these are open at once.
        args: numbers and strings that the viewer shows.
    """
    recorder = _recorder
    if recorder is None:
        yield
        return
    with nullcontext() if overlaps else own_track() as lane:
        start = time.monotonic_ns()
        try:
            yield
        finally:
            recorder.write(name, category, start, time.monotonic_ns(), args, lane)


@contextmanager
def own_track() -> Iterator[int | None]:
    """Keep a track for the present thread or task, so that what it records in the block nests there."""
    recorder = _recorder
    if recorder is None:
        yield None
        return
    lane = recorder.enter()
    try:
        yield lane
    finally:
        recorder.leave()


def spanned(name: str, category: str = "call", *, overlaps: bool = False) -> Callable[[_Function], _Function]:
    """Record every call of the decorated function or coroutine function as `span` does."""

    def decorate(function: _Function) -> _Function:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def timed(*args: Any, **kwargs: Any) -> Any:
                with span(name, category, overlaps=overlaps):
                    return await function(*args, **kwargs)
        else:

            @functools.wraps(function)
            def timed(*args: Any, **kwargs: Any) -> Any:
                with span(name, category, overlaps=overlaps):
                    return function(*args, **kwargs)

        return timed  # type: ignore[return-value]

    return decorate


def record(name: str, category: str, start_ns: int, end_ns: int, *, overlaps: bool = False, **args: Any) -> None:
    """Record what the present thread or task did between two readings of `time.monotonic_ns`, in its `own_track`."""
    recorder = _recorder
    if recorder is not None:
        with nullcontext() if overlaps else own_track() as lane:
            recorder.write(name, category, start_ns, end_ns, args, lane)


class _Recorder:
    """Appends this process's events to the file of `timeline`."""

    def __init__(self, timeline: dict[str, Any], process: str):
        self.timeline, self.pid = timeline, os.getpid()
        if timeline["host"] == _host():
            self._origin_ns = timeline["monotonic_ns"]
        else:
            self._origin_ns = timeline["wall_ns"] - (time.time_ns() - time.monotonic_ns())
        self._fd = _open(timeline["path"])
        self._broken = False
        self._ids = itertools.count(1)
        # Track of each thread or task with an open span, and how many it has open.
        self._lanes: dict[tuple[int, Any], list[int]] = {}
        self._named: set[int] = set()
        self._lock = threading.Lock()
        self._append_events([self._metadata("process_name", {"name": process})])

    def enter(self) -> int:
        """The track for a span of the calling thread or task: its own while it has one, else the first free one."""
        key = _caller()
        with self._lock:
            if key in self._lanes:
                self._lanes[key][1] += 1
                return self._lanes[key][0]
            taken = {lane for lane, _ in self._lanes.values()}
            lane = next(number for number in itertools.count(1) if number not in taken)
            self._lanes[key] = [lane, 1]
            new = lane not in self._named
            self._named.add(lane)
        if new:
            title = "main" if lane == 1 else f"at the same time {lane}"
            self._append_events([self._metadata("thread_name", {"name": title}, tid=lane)])
        return lane

    def leave(self) -> None:
        """After the span that `enter` was called for."""
        key = _caller()
        with self._lock:
            self._lanes[key][1] -= 1
            if self._lanes[key][1] == 0:
                del self._lanes[key]

    def write(self, name: str, category: str, start: int, end: int, args: dict[str, Any], lane: int | None) -> None:
        """Write a finished span; without `lane` as a pair of asynchronous events."""
        event = {"name": name, "cat": category, "pid": self.pid, "tid": lane or 1, "args": args}
        if lane is not None:
            self._append_events([{**event, "ph": "X", "ts": self._microseconds(start), "dur": (end - start) / 1000}])
            return
        event["id"] = f"{self.pid:x}.{next(self._ids):x}"
        begin = {**event, "ph": "b", "ts": self._microseconds(start)}
        self._append_events([begin, {**event, "ph": "e", "ts": self._microseconds(end), "args": {}}])

    def end(self) -> None:
        """Write the last event and the closing bracket."""
        self._append(json.dumps(self._metadata("process_sort_index", {"sort_index": -1})) + "\n]\n")
        # Another thread may still be inside a span, and the number be another file's by then.
        self._broken = True
        os.close(self._fd)

    def _microseconds(self, reading_ns: int) -> float:
        return (reading_ns - self._origin_ns) / 1000

    def _metadata(self, name: str, args: dict[str, Any], tid: int = 1) -> dict[str, Any]:
        return {"name": name, "ph": "M", "ts": 0, "pid": self.pid, "tid": tid, "args": args}

    def _append_events(self, events: list[dict[str, Any]]) -> None:
        self._append("".join(json.dumps(event) + ",\n" for event in events))

    def _append(self, text: str) -> None:
        data = text.encode()
        try:
            if self._broken or os.write(self._fd, data) == len(data):
                return
            reason = "the line was cut short"
        except OSError as error:
            reason = str(error)
        # What is observed must not end the run.
        self._broken = True
        logger.error("%s: %s; this process records no more", self.timeline["path"], reason)


def _open(path: str) -> int:
    """The file, for appending; begun with the opening bracket by the first process of a host that opens it."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)  # which another host may lack
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    os.write(fd, b"[\n")
    return fd


def _caller() -> tuple[int, Any]:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.get_ident(), task


def _host() -> str:
    """One value for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
