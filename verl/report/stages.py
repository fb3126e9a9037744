"""Drawing of the seconds of a step by stage."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl.report.run import Run
from verl.report.stage_names import STAGES
from verl.report.style import GRID, INK, SERIES, Drawn, figure, legend, number, short

# Stages below this share of a step are omitted.
_SMALL = 0.002


def median_seconds(run: Run) -> dict[str, float]:
    """Return the median seconds by stage, over the steps that have it."""
    found = {}
    for stage in STAGES:
        values = [value for value in run.curve(f"timing_s/{stage}")[1] if math.isfinite(value)]
        if values:
            found[stage] = statistics.median(values)
    return found


def draw_stages(runs: Sequence[Run]) -> Drawn | None:
    """Draw a bar for each stage and run; None if no run has any."""
    seconds = {run.name: median_seconds(run) for run in runs}
    longest = max((max(of.values()) for of in seconds.values() if of), default=0.0)
    stages = [stage for stage in STAGES if any(of.get(stage, 0) > _SMALL * longest for of in seconds.values())]
    if not stages:
        return None
    height = 0.55 + len(stages) * (0.12 + 0.19 * len(runs)) + (0.25 if len(runs) > 1 else 0)
    with figure("Seconds of a step by stage", height=max(2.0, height)) as (made, drawn):
        axes = made.add_subplot()
        thick = 0.78 / len(runs)
        for place, run in enumerate(runs):
            rows = [(row, seconds[run.name][stage]) for row, stage in enumerate(stages) if stage in seconds[run.name]]
            offset = (place - (len(runs) - 1) / 2) * thick
            bars = axes.barh(
                [row + offset for row, _ in rows],
                [value for _, value in rows],
                thick * 0.88,
                color=SERIES[place % len(SERIES)],
            )
            axes.bar_label(bars, [f"{number(round(value, 3))} s" for _, value in rows], padding=3, color=INK)
        axes.set_yticks(range(len(stages)), [STAGES[stage] for stage in stages])
        axes.set_ylim(len(stages) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_color(GRID)
        axes.set_xlim(0, longest * 1.18)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(number))
        axes.set_xlabel("seconds, median of the steps")
        if len(runs) > 1:
            legend(
                axes,
                [
                    (Line2D([], [], color=SERIES[i % len(SERIES)], linewidth=4), short(run.name, 26))
                    for i, run in enumerate(runs)
                ],
            )
    return drawn[0]
