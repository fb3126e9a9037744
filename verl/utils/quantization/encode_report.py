"""What quantizing the weights of an update took, and lost."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# By weight, sum of squared errors and sum of squares.
Errors = dict[str, list[float]]
_IN_LAYER = re.compile(r"\blayers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d+\.")


class EncodeReport:
    """What quantizing an update's weights took, and lost.

    Attributes:
        seconds: of this process; on an accelerator what it took to launch the kernels.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, sums: torch.Tensor) -> None:
        """Count a weight, or the rows of it that this process holds.

        Args:
            sums: [2], squared error and sum of squares; not read before `to_message`, so that no device is waited for.
        """
        self._sums[name] = sums

    def to_message(self) -> dict[str, Any]:
        """`seconds`, and `errors`: weight -> [squared error, sum of squares]."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {"seconds": self.seconds, "errors": dict(zip(self._sums, values, strict=True))}


def merged_errors(reports: Iterable[Mapping[str, Any]]) -> Errors:
    """The errors of `EncodeReport.to_message` of processes that each quantized other rows, added up."""
    totals: Errors = {}
    for report in reports:
        for name, (error, norm) in report["errors"].items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += error
            total[1] += norm
    return totals


def worst_error(errors: Errors) -> tuple[float, str] | None:
    """The largest relative error of a weight (Euclidean norm of the error over that of the weight), and which it is.

    Returns:
        None where nothing was quantized.
    """
    if not errors:
        return None
    relative = {name: _relative(*sums) for name, sums in errors.items()}
    # A NaN is worse than any number.
    name = max(relative, key=lambda key: math.inf if math.isnan(relative[key]) else relative[key])
    return relative[name], name


def errors_by_depth(errors: Errors) -> dict[str, list[float | None]]:
    """The relative error of each kind of weight in each decoder layer, to three digits.

    Returns:
        `self_attn.q_proj` and the like -> by number of the layer, None where it has no such weight; experts of a layer
        together. What is in no layer has one number under its own name.
    """
    sums: dict[str, dict[int, list[float]]] = {}
    for name, (error, norm) in errors.items():
        place = _IN_LAYER.search(name)
        kind, depth = (_EXPERT.sub(".experts.", place[2]), int(place[1])) if place else (name, 0)
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
