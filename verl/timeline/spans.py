"""Recorder of the activity of every process: one Chrome/Perfetto trace per run (JSON array of trace events).

    with span("forward", "train", rows=8): ...      # no effect unless this process has joined a timeline

The driver opens the file (`open_timeline`) and passes a `Timeline` to its processes, which join (`join_timeline`). A
span is written when it ends, as one line appended by one system call: nothing is kept in memory or collected, and a
killed process loses only its open spans. The array needs no closing bracket, so the trace of a failed run opens like
any other. Appending is atomic on a local file system; on a network file system lines of two processes
may be interleaved, and `timeline_reader` skips them.

Times are microseconds of the kernel's monotonic clock, which all processes of a host share, since the driver opened the
timeline. A process on another host uses the wall clock instead, accurate to NTP (about a millisecond), and writes to
the same path there.

Spans of one thread or asyncio task are on one track and nest; concurrent tasks get separate tracks. Spans with
`overlaps=True`, of which thousands may be open at once, become asynchronous events instead.
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
from typing import Any, TypedDict, TypeVar

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])
_recorder: _Recorder | None = None


class Timeline(TypedDict):
    """The timeline of a run, as the driver passes it to its processes.

    Attributes:
        path: absolute path of the file.
        host: identifies the driver's host.
        monotonic_ns, wall_ns: time at which the driver opened the timeline, on both clocks.
    """

    path: str
    host: str
    monotonic_ns: int
    wall_ns: int


def open_timeline(path: str | Path) -> Timeline:
    """Start the timeline of a run, with this process as its driver.

    An existing file belongs to another run. Then the spans go to PATH.starting until `publish_timeline`.

    Returns:
        The argument of `join_timeline`.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path):
        path = path.with_name(path.name + ".starting")
        path.unlink(missing_ok=True)
    timeline = Timeline(path=str(path), host=_host(), monotonic_ns=time.monotonic_ns(), wall_ns=time.time_ns())
    join_timeline(timeline, "driver")
    return timeline


def timeline_file() -> Path | None:
    """Return the file that this process joined; None without a timeline."""
    return None if _recorder is None else Path(_recorder.timeline["path"])


def publish_timeline(path: str | Path) -> None:
    """Rename the driver's timeline to `path`; a process that still opens the earlier name writes to the same file.

    Raises:
        OSError: the file cannot be renamed.
    """
    written, path = timeline_file(), Path(path).absolute()
    if written is None or written == path:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(written, path)
    try:
        written.symlink_to(path)  # `close_timeline` removes it
    except OSError as error:
        logger.warning("%s: no link to %s (%s): restarted processes write to a file of their own", written, path, error)


def join_timeline(timeline: Timeline | None, process: str) -> None:
    """Record this process's spans under the name `process` from now on; no effect if `timeline` is None.

    A second call in the same process keeps the first name: an engine may run its workers in its own process.
    """
    global _recorder
    if timeline is not None and (_recorder is None or _recorder.pid != os.getpid()):
        _recorder = _Recorder(timeline, process)


def current_timeline() -> Timeline | None:
    """Return the timeline that this process joined, to pass to its child processes; None without one."""
    return None if _recorder is None else _recorder.timeline


def close_timeline() -> None:
    """Close the array and stop recording. Call it when no other process writes any more."""
    global _recorder
    if _recorder is not None:
        _recorder.end()
        if os.path.islink(_recorder.timeline["path"]):
            os.unlink(_recorder.timeline["path"])
        _recorder = None


@contextmanager
def span(name: str, category: str = "call", *, overlaps: bool = False, **args: Any) -> Iterator[None]:
    """Record the block, whether it raises or not.

    Args:
        name: activity of the block.
        category: `timeline_reader` evaluates `stage`, `engine` and `train`.
        overlaps: many such spans are open at once.
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
    """Keep a track for the current thread or task, so that its spans within the block nest there."""
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
    """Record every call of the decorated function or coroutine function, like `span`."""

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
    """Record a span of the current thread or task between two readings of `time.monotonic_ns`, in its `own_track`."""
    recorder = _recorder
    if recorder is not None:
        with nullcontext() if overlaps else own_track() as lane:
            recorder.write(name, category, start_ns, end_ns, args, lane)


class _Recorder:
    """Append this process's events to the file of `timeline`."""

    def __init__(self, timeline: Timeline, process: str):
        self.timeline, self.pid = timeline, os.getpid()
        if timeline["host"] == _host():
            self._origin_ns = timeline["monotonic_ns"]
        else:
            self._origin_ns = timeline["wall_ns"] - (time.time_ns() - time.monotonic_ns())
        self._fd = _open(timeline["path"])
        self._broken = False
        self._ids = itertools.count(1)
        # By thread or task with an open span: its track, and its number of open spans.
        self._lanes: dict[tuple[int, Any], list[int]] = {}
        self._named: set[int] = set()
        self._lock = threading.Lock()
        self._append_events([self._metadata("process_name", {"name": process})])

    def enter(self) -> int:
        """Return the track for a span of the calling thread or task: its current one, or the first free one."""
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
        """Release the track after the span for which `enter` was called."""
        key = _caller()
        with self._lock:
            self._lanes[key][1] -= 1
            if self._lanes[key][1] == 0:
                del self._lanes[key]

    def write(self, name: str, category: str, start: int, end: int, args: dict[str, Any], lane: int | None) -> None:
        """Write a finished span; if `lane` is None, as a pair of asynchronous events."""
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
        # Another thread may still be inside a span, and the file descriptor may be reused.
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
        # A failure to record must not end the run.
        self._broken = True
        logger.error("%s: %s; this process stops recording", self.timeline["path"], reason)


def _open(path: str) -> int:
    """Open the file for appending. The first process of a host writes the opening bracket."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)  # another host may lack it
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
    """Return one value for all processes that share a monotonic clock."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename
