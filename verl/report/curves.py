"""Drawing of a `Panel`: one line per curve and run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.lines import Line2D

from verl.report.panels import Panel
from verl.report.run import Curve, Run, is_number
from verl.report.style import DASHES, SERIES, SOFT, Drawn, figure, legend, number, short, step_axis, value_axis


def draw_curves(panel: Panel, runs: Sequence[Run]) -> Drawn | None:
    """Return the figure, or None if no run has a number for it.

    One run has a color for each curve; several have a color each, and the curves differ by their dashes.
    """
    curves = _curves(panel, runs)
    if not curves or (panel.unless_zero and all(value == 0 for *_, (_, values) in curves for value in values)):
        return None
    labels = list(dict.fromkeys(label for _, label, _ in curves))
    with figure(panel.title) as (made, drawn):
        axes = made.add_subplot()
        for run, label, (steps, values) in curves:
            color = SERIES[(runs.index(run) if len(runs) > 1 else labels.index(label)) % len(SERIES)]
            dash = DASHES[labels.index(label) % len(DASHES)] if len(runs) > 1 else "solid"
            alone = sum(math.isfinite(value) for value in values) < 3
            axes.plot(steps, values, color=color, linestyle=dash, marker="o" if panel.markers or alone else None)
        entries = _entries(runs, labels)
        if limit := _limit(panel, runs):
            axes.axhline(limit, color=SOFT, linestyle=DASHES[2], linewidth=1)
            entries.append((Line2D([], [], color=SOFT, linestyle=DASHES[2]), f"limit {number(limit)}"))
        steps = [step for _, _, (steps, _) in curves for step in steps]
        step_axis(axes, min(steps), max(steps))
        if not panel.log:
            _range(axes, [value for _, _, (_, values) in curves for value in values if math.isfinite(value)], panel)
        value_axis(axes, panel.unit, log=panel.log, share=panel.share)
        if len(entries) > 1:
            legend(axes, entries)
    return drawn[0]


def _curves(panel: Panel, runs: Sequence[Run]) -> list[tuple[Run, str, Curve]]:
    """Drop a curve that equals an earlier one in every run: for example a score as `acc` and as `reward`."""
    found: list[tuple[Run, str, Curve]] = []
    seen: list[str] = []
    for metric, label in panel.curves.items():
        curves = [run.curve(metric) for run in runs]
        if repr(curves) in seen or len(seen) == len(DASHES):
            continue
        seen.append(repr(curves))
        for run, (steps, values) in zip(runs, curves, strict=True):
            shown = [value if value > 0 or not panel.log else math.nan for value in values]
            if any(math.isfinite(value) for value in shown):
                found.append((run, label, (steps, shown)))
    return found


def _entries(runs: Sequence[Run], labels: Sequence[str]) -> list[tuple[Artist, str]]:
    if len(runs) == 1:
        return [(Line2D([], [], color=SERIES[place % len(SERIES)]), label) for place, label in enumerate(labels)]
    entries: list[tuple[Artist, str]] = [
        (Line2D([], [], color=SERIES[place % len(SERIES)], linewidth=2.5), short(run.name, 26))
        for place, run in enumerate(runs)
    ]
    if len(labels) > 1:
        entries += [
            (Line2D([], [], color=SOFT, linestyle=DASHES[place % len(DASHES)]), label)
            for place, label in enumerate(labels)
        ]
    return entries


def _limit(panel: Panel, runs: Sequence[Run]) -> float | None:
    """Return the limit if all runs that have one agree."""
    if not panel.limit:
        return None
    found = [run.config.get(panel.limit) for run in runs]
    values = {float(value) for value in found if is_number(value)}
    return values.pop() if len(values) == 1 else None


def _range(axes: object, values: Sequence[float], panel: Panel) -> None:
    """Start the axis at 0 if that is near, and add some room if all values are equal."""
    low, high = min(values), max(values)
    room = (high - low) * 0.08 or abs(high) * 0.1 or (0.01 if panel.share else 1.0)
    near = panel.from_zero or low <= 0.5 * high or low == high
    bottom = 0.0 if low >= 0 and near else low - room
    axes.set_ylim(bottom - (room * 0.25 if bottom == 0 else 0), high + room)  # type: ignore[attr-defined]
