"""Time and quantization error of encoding the weights of an update."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TypedDict

import torch

# Weight -> [sum of squared errors, sum of squares].
Errors = dict[str, list[float]]
_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class EncodeReportMessage(TypedDict):
    """An `EncodeReport` as plain values.

    Keys:
        seconds: time of one process.
        errors: weight -> [sum of squared errors, sum of squares].
    """

    seconds: float
    errors: Errors


class EncodeReport:
    """Time and errors of the weights that one process encoded.

    Attributes:
        seconds: time of this process; on an accelerator only the time to launch the kernels.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, sums: torch.Tensor) -> None:
        """Add a weight, or the rows of it that this process holds.

        Args:
            sums: [2], sum of squared errors and sum of squares. Only `to_message` reads it and synchronizes.
        """
        self._sums[name] = sums

    def update(self, other: EncodeReport) -> None:
        """Add the weights and the time of another report."""
        self._sums |= other._sums
        self.seconds += other.seconds

    def to_message(self) -> EncodeReportMessage:
        """Return the report as plain values."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {"seconds": self.seconds, "errors": dict(zip(self._sums, values, strict=True))}


def merged_errors(reports: Iterable[EncodeReportMessage]) -> Errors:
    """Add up the errors of processes that each encoded other rows."""
    return added_errors(report["errors"] for report in reports)


def added_errors(parts: Iterable[Errors]) -> Errors:
    """Add up sums of squares, name by name."""
    totals: Errors = {}
    for part in parts:
        for name, (error, norm) in part.items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += error
            total[1] += norm
    return totals


def worst_error(errors: Errors) -> tuple[float, str] | None:
    """Return the largest relative error (Euclidean norm of the error over that of the weight) and the weight's name.

    Returns:
        None if nothing was quantized.
    """
    worst = worst_errors(errors, 1)
    return worst[0] if worst else None


def worst_errors(errors: Errors, count: int) -> list[tuple[float, str]]:
    """Return up to `count` relative errors and the names of their weights, the largest first; NaN is the largest."""
    relative = [(_relative(*sums), name) for name, sums in errors.items()]
    return sorted(relative, key=lambda found: -math.inf if math.isnan(found[0]) else -found[0])[:count]


def errors_by_depth(errors: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    """Return the relative error of each kind of weight in each decoder layer, to three digits.

    Returns:
        Kind, such as `self_attn.q_proj` -> errors by layer number, None for a layer without such a weight. Experts of
        one layer are combined. A weight outside the layers has one number under its own name.
    """
    sums: dict[str, dict[int, list[float]]] = {}
    for name, (error, norm) in errors.items():
        match = _IN_LAYER.search(name)
        kind, depth = (_EXPERT.sub(".experts.", match[2]), int(match[1])) if match else (name, 0)
        total = sums.setdefault(kind.removesuffix(".weight"), {}).setdefault(depth, [0.0, 0.0])
        total[0] += error
        total[1] += norm
    return {
        kind: [
            float(f"{_relative(*of_layers[depth]):.3g}") if depth in of_layers else None
            for depth in range(max(of_layers) + 1)
        ]
        for kind, of_layers in sums.items()
    }


def _relative(error: float, norm: float) -> float:
    # A weight of zeros is represented exactly.
    return math.sqrt(error / norm) if norm else 0.0
