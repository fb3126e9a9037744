"""Drawing of the activity of every process in one step, from the run's timeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl.report.style import GRID, INK, SERIES, SOFT, Drawn, figure, legend, number, short
from verl.report.text import visible
from verl.timeline.reader import read_events, spans, stage_seconds, step_shares, step_windows

# For a long run the last steps are sufficient.
READ_BYTES = 32 * 2**20
# Number of drawn processes per kind, and of rows for stages of the driver that overlap.
SHOWN_OF_A_KIND = 4
SHOWN_ROWS = 8

Interval = tuple[float, float]
STAGE, ENGINE, FORWARD, BACKWARD, WEIGHTS, SCORE = SERIES[7], SERIES[0], SERIES[2], SERIES[1], SERIES[3], SERIES[4]
LEGEND = {
    "stage of the driver": STAGE,
    "engine generates": ENGINE,
    "trainer: forward": FORWARD,
    "trainer: backward, optimizer": BACKWARD,
    "weight update": WEIGHTS,
    "rewards": SCORE,
}


@dataclass
class Lane:
    """One row of the figure.

    Attributes:
        label: the process.
        bars: (color, begin, end, text), seconds since the step began.
        level: (second, requests in flight), for the lane of a replica's requests.
    """

    label: str
    bars: list[tuple[str, float, float, str]]
    level: list[tuple[float, int]]


@dataclass(frozen=True)
class StepTimeline:
    """A drawn step, and the shares in which engines and trainer computed."""

    drawn: Drawn
    step: int
    seconds: float
    engine: float
    train: float
    overhead: float
    left_out: int


def draw_timeline(path: Path, title: str) -> StepTimeline:
    """Draw the last step without a validation, or the last step if all have one.

    Raises:
        ValueError: the file holds no finished step.
        OSError: the file cannot be read.
    """
    events = read_events(path, READ_BYTES)
    windows, stages = step_windows(events), stage_seconds(events)
    if not windows:
        raise ValueError(f"{path} contains no finished step yet")
    step = max(windows, key=lambda step: ("testing" not in stages[step], step))
    lanes, left_out = _lanes(events, windows[step])
    shares = step_shares(events)[step]
    seconds = (windows[step][1] - windows[step][0]) / 1e6
    with figure(f"{title}: step {step}", width=11.45, height=0.95 + 0.3 * len(lanes)) as (made, drawn):
        axes = made.add_subplot()
        for row, lane in enumerate(lanes):
            _draw_lane(axes, row, lane, seconds)
        axes.set_yticks(range(len(lanes)), [lane.label for lane in lanes], color=INK)
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.set_xlim(0, seconds)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(number))
        axes.set_xlabel("seconds since the step began")
        used = {color for lane in lanes for color, *_ in lane.bars}
        if used:
            legend(
                axes, [(Patch(color=color), name) for name, color in LEGEND.items() if color in used], columns_of=240
            )
    return StepTimeline(drawn[0], step, seconds, shares.engine, shares.train, shares.overhead, left_out)


def _lanes(events: Sequence[dict[str, Any]], window: Interval) -> tuple[list[Lane], int]:
    """Return the lanes, driver first, and the number of omitted processes."""
    names = {
        event["pid"]: short(visible(event["args"]["name"]), 40) for event in events if event["name"] == "process_name"
    }
    order = sorted(names, key=lambda pid: (_kind(names[pid]), names[pid]))
    drawn: dict[int, int] = {}
    lanes: list[Lane] = []
    left_out = 0
    near = [event for event in events if event["ts"] < window[1] and event["ph"] in "Xbe"]
    for pid in order:
        own = [event for event in near if event["pid"] == pid]
        of_process = _of_process(names[pid], own, window)
        kind = _kind(names[pid])
        drawn[kind] = drawn.get(kind, 0) + bool(of_process)
        if drawn[kind] > SHOWN_OF_A_KIND:
            left_out += bool(of_process)
        else:
            lanes += of_process
    return lanes, left_out


def _kind(name: str) -> int:
    """Return the sort key of a process: driver, replicas, their workers, trainer ranks, reward workers."""
    if name.startswith("replica"):
        return 2 if "worker" in name else 1
    return {"driver": 0, "trainer": 3, "reward": 4}.get(name.partition(" ")[0], 5)


def _of_process(name: str, events: Sequence[dict[str, Any]], window: Interval) -> list[Lane]:
    if _kind(name) == 0:
        stages = [(e, STAGE, short(visible(e["name"]), 40)) for e in spans(events, "stage") if e["name"] != "step"]
        rows = _rows(_cut(stages, window))[:SHOWN_ROWS]
        return [Lane(name if not row else "", bars, []) for row, bars in enumerate(rows)]
    if _kind(name) == 1:
        level = _in_flight(spans(events, "request"), window)
        return [Lane(f"{name}: requests", [], level)] if any(count for _, count in level) else []
    marked = [(e, ENGINE, "") for e in spans(events, "engine")]
    marked += [(e, FORWARD if e["name"] == "forward" else BACKWARD, "") for e in spans(events, "train")]
    for call in spans(events, "call"):
        if call["name"].startswith(("update:", "export:")):
            marked.append((call, WEIGHTS, ""))
        elif call["name"] == "score":
            marked.append((call, SCORE, ""))
    bars = _merged(_cut(marked, window), (window[1] - window[0]) / 1e6 / 800)
    return [Lane(name, bars, [])] if bars else []


def _cut(marked: Iterable[tuple[dict[str, Any], str, str]], window: Interval) -> list[tuple[str, float, float, str]]:
    """Return the events within the window, in seconds since its start."""
    bars = []
    for event, color, text in marked:
        begin, end = max(event["ts"], window[0]), min(event["ts"] + event["dur"], window[1])
        if end > begin:
            bars.append((color, (begin - window[0]) / 1e6, (end - window[0]) / 1e6, text))
    return sorted(bars, key=lambda bar: bar[1])


def _rows(bars: Sequence[tuple[str, float, float, str]]) -> list[list[tuple[str, float, float, str]]]:
    """Distribute events over the smallest number of rows without overlaps."""
    rows: list[list[tuple[str, float, float, str]]] = []
    for bar in bars:
        row = next((row for row in rows if row[-1][2] <= bar[1] + 1e-9), None)
        if row is None:
            rows.append([bar])
        else:
            row.append(bar)
    return rows


def _merged(bars: Sequence[tuple[str, float, float, str]], gap: float) -> list[tuple[str, float, float, str]]:
    """Merge bars of one color that are less than `gap` seconds apart, because they look like one bar."""
    merged: list[tuple[str, float, float, str]] = []
    last: dict[str, int] = {}
    for color, begin, end, text in bars:
        at = last.get(color)
        if at is not None and begin - merged[at][2] < gap:
            merged[at] = (color, merged[at][1], max(end, merged[at][2]), text)
        else:
            last[color] = len(merged)
            merged.append((color, begin, end, text))
    return merged


def _in_flight(requests: Iterable[dict[str, Any]], window: Interval) -> list[tuple[float, int]]:
    """Return the number of open requests at each time at which it changes."""
    changes: dict[float, int] = {}
    for _, begin, end, _ in _cut([(request, "", "") for request in requests], window):
        changes[begin] = changes.get(begin, 0) + 1
        changes[end] = changes.get(end, 0) - 1
    level, count = [(0.0, 0)], 0
    for second in sorted(changes):
        count += changes[second]
        level.append((second, count))
    return [*level, ((window[1] - window[0]) / 1e6, count)]


def _draw_lane(axes: Axes, row: int, lane: Lane, seconds: float) -> None:
    axes.axhspan(row - 0.36, row + 0.36, color=GRID, alpha=0.45, linewidth=0)
    if lane.level:
        most = max(count for _, count in lane.level)
        times = [second for second, _ in lane.level]
        heights = [row + 0.36 - 0.68 * count / most for _, count in lane.level]
        axes.fill_between(times, heights, row + 0.36, step="post", color=ENGINE, alpha=0.45, linewidth=0)
        axes.text(seconds * 0.995, row, f"at most {most:,}", ha="right", va="center", fontsize=7.5, color=SOFT)
    for color, begin, end, text in lane.bars:
        axes.barh(row, end - begin, 0.72, left=begin, color=color, alpha=0.35 if color == STAGE else 1.0, linewidth=0)
        # Inches of the bar against those of the text.
        if text and (end - begin) / seconds * 9.5 > 0.075 * len(text) + 0.05:
            axes.text((begin + end) / 2, row, text, ha="center", va="center", fontsize=7.5, color=INK)
