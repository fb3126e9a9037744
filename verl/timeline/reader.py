"""Summary of a timeline by step: seconds of each stage, and the busy share of the processes.

    python3 -m verl.timeline.reader timeline.json

prints the seconds of each step and the shares in which at least one engine was in a forward pass (`engine`), at least
one trainer rank was in forward, backward or optimizer (`train`), and no process was in either (`overhead`).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Event = dict[str, Any]
Interval = tuple[float, float]

# Thirty years in microseconds, and more steps than any run has; larger numbers are damage.
_MAX_TIME, _MAX_STEP = 1e15, 10**12


@dataclass(frozen=True)
class StepShares:
    """Time shares of one step.

    Attributes:
        seconds: length of the step.
        engine, train: share in which at least one engine, or trainer rank, computed.
        overhead: share in which no engine and no trainer rank computed.
        busy: by process, the share in which it computed.
    """

    seconds: float
    engine: float
    train: float
    overhead: float
    busy: dict[str, float]


def read_events(path: str | Path, at_most: int | None = None) -> list[Event]:
    """Read the events of a trace file, also of a failed run; skip a damaged line with a warning.

    Args:
        path: the file.
        at_most: bytes to read of a larger file: its start, which names the processes, and its end.

    Returns:
        events with the fields that `spans` writes, of the right types: name, ph, pid, ts and args; dur or id.

    Raises:
        OSError: the file cannot be read.
    """
    events = []
    for number, line in enumerate(_read(Path(path), at_most).decode(errors="replace").split("\n"), start=1):
        text = line.strip().rstrip(",")
        if text in ("", "[", "]"):
            continue
        try:
            event = json.loads(text)
        except (ValueError, RecursionError):
            event = None
        if _is_event(event):
            events.append(event)
        else:
            logger.warning("%s: line %d is damaged and is skipped", path, number)
    return events


def _is_event(value: Any) -> bool:
    """Return True for an event as `spans` writes it, with times and a step in range."""
    if not isinstance(value, dict) or not isinstance(value.get("args"), dict):
        return False
    if not isinstance(value.get("name"), str) or type(value.get("pid")) is not int or not _is_time(value.get("ts")):
        return False
    kind = value.get("ph")
    if value["name"] == "process_name":
        return kind == "M" and isinstance(value["args"].get("name"), str)
    if value.get("cat") == "stage" and kind != "e":
        step = value["args"].get("step")
        if value["name"] == "step" if step is None else type(step) is not int or not 0 <= step <= _MAX_STEP:
            return False
    if kind == "X":
        return _is_time(value.get("dur")) and bool(value["dur"] >= 0)
    return kind == "M" or (kind in ("b", "e") and isinstance(value.get("id"), str))


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MAX_TIME


def _read(path: Path, at_most: int | None) -> bytes:
    """Return the file, or complete lines from the first sixteenth of `at_most` and from the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if at_most is None or size <= at_most:
            return file.read()
        head = file.read(at_most // 16)
        file.seek(size - (at_most - len(head)))
        return head[: head.rfind(b"\n") + 1] + file.read().partition(b"\n")[2]


def step_windows(events: Iterable[Event]) -> dict[int, Interval]:
    """Start and end of each step, in microseconds. A step takes at least one."""
    return {
        event["args"]["step"]: (event["ts"], event["ts"] + event["dur"])
        for event in spans(events, "stage")
        if event["name"] == "step" and event["dur"] >= 1
    }


def stage_seconds(events: Sequence[Event]) -> dict[int, dict[str, float]]:
    """By step, the seconds of each stage of the driver: the values of `timing_s/*`."""
    windows = step_windows(events)
    seconds: dict[int, dict[str, float]] = {step: {} for step in windows}
    for event in spans(events, "stage"):
        step = event["args"].get("step")
        if step is None:
            step = next((step for step, (begin, end) in windows.items() if begin <= event["ts"] < end), None)
        if step in seconds:
            seconds[step][event["name"]] = seconds[step].get(event["name"], 0.0) + event["dur"] / 1e6
    return seconds


def step_shares(events: Sequence[Event]) -> dict[int, StepShares]:
    """Time shares of each step. Processes that compute at the same time count once, except in `busy`."""
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    engine, train = spans(events, "engine"), spans(events, "train")
    of_process: dict[str, list[Event]] = {}
    for event in (*engine, *train):
        of_process.setdefault(names.get(event["pid"], f"process {event['pid']}"), []).append(event)
    return {
        step: StepShares(
            seconds=(window[1] - window[0]) / 1e6,
            engine=_share(engine, window),
            train=_share(train, window),
            overhead=1 - _share([*engine, *train], window),
            busy={name: _share(own, window) for name, own in sorted(of_process.items())},
        )
        for step, window in step_windows(events).items()
    }


def _share(events: Iterable[Event], window: Interval) -> float:
    """Share of the window in which at least one event was open."""
    begin, end = window
    return covered([(event["ts"], event["ts"] + event["dur"]) for event in events], begin, end) / (end - begin)


def covered(intervals: Iterable[Interval], begin: float, end: float) -> float:
    """Length of the part of [begin, end] that at least one of `intervals` covers."""
    total, reached = 0.0, begin
    for start, stop in sorted(intervals):
        total += max(0.0, min(stop, end) - max(start, reached))
        reached = min(max(reached, stop), end)
    return total


def spans(events: Iterable[Event], category: str) -> list[Event]:
    """Spans of a category; a complete pair of asynchronous events becomes one span."""
    found: list[Event] = []
    begun: dict[str, Event] = {}
    for event in events:
        if event.get("cat") != category:
            continue
        if event["ph"] == "X":
            found.append(event)
        elif event["ph"] == "b":
            begun[event["id"]] = event
        elif event["ph"] == "e" and event["id"] in begun:
            begin = begun.pop(event["id"])
            if event["ts"] < begin["ts"]:
                continue
            found.append({**begin, "ph": "X", "dur": event["ts"] - begin["ts"]})
    return found


def main() -> None:
    """Print the time shares of each step."""
    parser = argparse.ArgumentParser(description="time shares of each step")
    parser.add_argument("timeline", type=Path, nargs="+", help="trainer.timeline of a run; one file per host")
    try:
        events = [event for path in parser.parse_args().timeline for event in read_events(path)]
    except OSError as error:
        parser.error(str(error))
    for step, shares in sorted(step_shares(events).items()):
        busy = ", ".join(f"{name} {share:.0%}" for name, share in shares.busy.items())
        sys.stdout.write(
            f"step {step}: {shares.seconds:.3f} s, engine {shares.engine:.1%}, train {shares.train:.1%}, "
            f"overhead {shares.overhead:.1%} ({busy})\n"
        )


if __name__ == "__main__":
    main()
