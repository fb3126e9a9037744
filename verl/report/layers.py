"""Quantization error: the worst weight of each update, and every layer in the last update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from matplotlib.artist import Artist
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from verl.report.run import Run, as_float
from verl.report.style import DASHES, GRID, SERIES, SOFT, Drawn, figure, legend, short, step_axis, value_axis
from verl.report.text import visible

ERROR, LAYER = "weight_update/max_quantization_error", "weight_update/max_quantization_error_layer"
BY_DEPTH = "weight_update/quantization_errors"
_NAMED = 6


@dataclass(frozen=True)
class LayerError:
    """A weight with the largest error of some update.

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
    """Return the weights, largest error first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, error in zip(*run.curve(ERROR), strict=True):
        found.setdefault(_layer_of(run, step), []).append((step, error))
    rows = [
        LayerError(layer, len(points), points[0][0], points[-1][0], max(error for _, error in points))
        for layer, points in found.items()
    ]
    return sorted(rows, key=lambda row: -math.inf if math.isnan(row.largest) else -row.largest)


def _layer_of(run: Run, step: int) -> str:
    """Return the name of the weight with the largest error in the update of a step."""
    return visible(str(run.records[step].get(LAYER, "not recorded")), 200)


def draw_layers(runs: Sequence[Run]) -> Drawn | None:
    """Draw the largest error over the steps; None without quantization. A single run has one color per layer."""
    quantized = [run for run in runs if any(math.isfinite(error) for error in run.curve(ERROR)[1])]
    if not quantized:
        return None
    steps = [step for run in quantized for step in run.curve(ERROR)[0]]
    with figure("Largest quantization error of a weight") as (made, drawn):
        axes = made.add_subplot()
        if len(runs) > 1:
            entries: list[tuple[Artist, str]] = []
            for run in quantized:
                color = SERIES[runs.index(run) % len(SERIES)]
                axes.plot(*run.curve(ERROR), color=color)
                entries.append((Line2D([], [], color=color, linewidth=2.5), short(run.name, 26)))
        else:
            entries = _points(axes, runs[0])
        step_axis(axes, min(steps), max(steps))
        low, high = axes.get_ylim()
        # Noise in the fourth digit must not fill the axis.
        axes.set_ylim(min(low, 0.9 * high), high + 0.02 * high)
        value_axis(axes, "error, relative to the weight", share=True)
        legend(axes, entries)
    return drawn[0]


def _points(axes: object, run: Run) -> list[tuple[Artist, str]]:
    named = [row.layer for row in sorted(worst_layers(run), key=lambda row: -row.steps)[:_NAMED]]
    steps, errors = run.curve(ERROR)
    axes.plot(steps, errors, color=GRID, linewidth=1)  # type: ignore[attr-defined]
    entries: list[tuple[Artist, str]] = []
    colors = dict(zip(named, SERIES, strict=False))
    groups = {**colors, **({"other layers": SOFT} if len(worst_layers(run)) > _NAMED else {})}
    for layer, color in groups.items():
        chosen = [
            (step, error)
            for step, error in zip(steps, errors, strict=True)
            if colors.get(_layer_of(run, step), SOFT) == color
        ]
        axes.plot(*zip(*chosen, strict=True), "o", color=color)  # type: ignore[attr-defined]
        entries.append((Line2D([], [], color=color, marker="o", linestyle="none"), short(layer, 44)))
    return entries


def draw_depths(runs: Sequence[Run]) -> Drawn | None:
    """Draw the error of every decoder layer in the last update; None if no run has it.

    A single run has one line per kind of weight; several runs show the largest error of each layer.
    """
    shown = [(run, errors) for run in runs if (errors := _last_errors(run))]
    if not shown:
        return None
    lines: list[tuple[str, list[float], str]] = []
    if len(runs) > 1:
        for run, errors in shown:
            of_depths = zip_longest(*errors.values(), fillvalue=math.nan)
            most = [max((e for e in found if not math.isnan(e)), default=math.nan) for found in of_depths]
            lines.append((short(run.name, 26), most, SERIES[runs.index(run) % len(SERIES)]))
    else:
        [(_, errors)] = shown
        lines = [(kind, values, SERIES[i % len(SERIES)]) for i, (kind, values) in enumerate(errors.items())]
    with figure("Quantization error by layer, last update") as (made, drawn):
        axes = made.add_subplot()
        for number, (_, values, color) in enumerate(lines):
            style = DASHES[number // len(SERIES) % len(DASHES)]
            axes.plot(range(len(values)), values, "o", linestyle=style, color=color)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("decoder layer, from the input")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.9 * high), high + 0.02 * high)
        value_axis(axes, "error, relative to the weight", share=True)
        legend(axes, [(Line2D([], [], color=color, linewidth=2.5), name) for name, _, color in lines])
    return drawn[0]


def _last_errors(run: Run) -> dict[str, list[float]]:
    """Return the errors in decoder layers by kind of weight; NaN if a layer has none."""
    for step in sorted(run.records, reverse=True):
        if isinstance(found := run.records[step].get(BY_DEPTH), dict):
            errors = {
                short(kind, 44): [as_float(value) for value in values]
                for kind, values in found.items()
                if isinstance(values, list) and len(values) > 1
            }
            return {kind: values for kind, values in errors.items() if any(map(math.isfinite, values))}
    return {}
