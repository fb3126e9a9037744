"""What quantising lost: the worst weight of each update, and which layers they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.lines import Line2D

from verl.report.run import Run
from verl.report.style import GRID, SERIES, SOFT, Drawn, figure, legend, short, step_axis, value_axis

ERROR, LAYER = "weight_update/max_quantization_error", "weight_update/max_quantization_error_layer"
_NAMED = 6


@dataclass(frozen=True)
class LayerError:
    """A weight that was the worst of some update.

    Attributes:
        layer: its name.
        steps: in how many updates it was.
        first, last: the first and the last of them.
        largest: its largest relative error.
    """

    layer: str
    steps: int
    first: int
    last: int
    largest: float


def worst_layers(run: Run) -> list[LayerError]:
    """Largest error first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, error in zip(*run.curve(ERROR), strict=True):
        found.setdefault(str(run.records[step].get(LAYER, "not recorded")), []).append((step, error))
    rows = [
        LayerError(layer, len(points), points[0][0], points[-1][0], max(error for _, error in points))
        for layer, points in found.items()
    ]
    return sorted(rows, key=lambda row: -math.inf if math.isnan(row.largest) else -row.largest)


def draw_layers(runs: Sequence[Run]) -> Drawn | None:
    """The worst error over the steps, None if nothing was quantised; of one run each point in its layer's colour."""
    quantised = [run for run in runs if any(math.isfinite(error) for error in run.curve(ERROR)[1])]
    if not quantised:
        return None
    steps = [step for run in quantised for step in run.curve(ERROR)[0]]
    with figure("Largest quantisation error of a weight") as (made, drawn):
        axes = made.add_subplot()
        if len(runs) > 1:
            entries = []
            for run in quantised:
                color = SERIES[runs.index(run) % len(SERIES)]
                axes.plot(*run.curve(ERROR), color=color)
                entries.append((Line2D([], [], color=color, linewidth=2.5), short(run.name, 26)))
        else:
            entries = _points(axes, runs[0])
        step_axis(axes, min(steps), max(steps))
        low, high = axes.get_ylim()
        # Noise in the fourth digit must not fill the figure.
        axes.set_ylim(min(low, 0.9 * high), high + 0.02 * high)
        value_axis(axes, "error, relative to the weight", share=True)
        legend(axes, entries)
    return drawn[0]


def _points(axes: object, run: Run) -> list[tuple[object, str]]:
    named = [row.layer for row in sorted(worst_layers(run), key=lambda row: -row.steps)[:_NAMED]]
    steps, errors = run.curve(ERROR)
    axes.plot(steps, errors, color=GRID, linewidth=1)  # type: ignore[attr-defined]
    entries: list[tuple[object, str]] = []
    colors = dict(zip(named, SERIES, strict=False))
    groups = {**colors, **({"other layers": SOFT} if len(worst_layers(run)) > _NAMED else {})}
    for layer, color in groups.items():
        chosen = [
            (step, error)
            for step, error in zip(steps, errors, strict=True)
            if colors.get(str(run.records[step].get(LAYER, "not recorded")), SOFT) == color
        ]
        axes.plot(*zip(*chosen, strict=True), "o", color=color)  # type: ignore[attr-defined]
        entries.append((Line2D([], [], color=color, marker="o", linestyle="none"), short(layer, 44)))
    return entries
