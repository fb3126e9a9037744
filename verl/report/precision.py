"""The curve of `verl describe --budget`: KL divergence against the bytes of the weights and the speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.ticker import FuncFormatter, MaxNLocator

from verl.report.style import SERIES, SOFT, Drawn, figure, number, value_axis
from verl.utils.byte_size import MIB


class Point(NamedTuple):
    """A choice of layers.

    Attributes:
        nbytes: bytes of all weights in the engine.
        tokens_per_second: of one sequence.
        kl: KL divergence from the unquantized model in nats per token, above 0.
    """

    nbytes: float
    tokens_per_second: float
    kl: float


def draw_precision(
    predicted: Sequence[Point], measured: Sequence[Point], chosen: Sequence[Point], budget: float
) -> Drawn:
    """Draw the best choices of layers, with the budget as a line."""
    with figure("KL divergence of a quantized model", width=9.0, height=3.4) as (made, drawn):
        left, right = made.subplots(1, 2, sharey=True)
        for axes, label in ((left, "weights in the engine, MiB"), (right, "tokens per second of one sequence")):
            by_size = axes is left

            def columns(points: Sequence[Point], by_size: bool = by_size) -> tuple[list[float], list[float]]:
                x = [point.nbytes / MIB if by_size else point.tokens_per_second for point in points]
                return x, [point.kl for point in points]

            axes.axhline(budget, color=SOFT, linewidth=1, linestyle="dashed", label="budget")
            axes.plot(*columns(predicted), color=SERIES[0], label="predicted")
            axes.plot(*columns(measured), "o", color=SERIES[1], label="measured")
            axes.plot(*columns(chosen), "D", color=SERIES[2], markersize=6, label="chosen")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
            axes.xaxis.set_major_formatter(FuncFormatter(number))
            axes.set_xlabel(label)
        value_axis(left, "KL divergence, nats per token", log=True)
        right.legend(loc="lower right")
    return drawn[0]
