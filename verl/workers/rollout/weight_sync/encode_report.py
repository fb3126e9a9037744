"""What quantising the weights of an update took, and lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


class EncodeReport:
    """What quantising an update's weights took, and lost.

    Attributes:
        seconds: of this process; on an accelerator what it took to launch the kernels.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, sums: torch.Tensor) -> None:
        """Count a weight, or the rows of it that this process holds.

        Args:
            sums: [2], squared error and sum of squares; not read before `to_plain`, so that no device is waited for.
        """
        self._sums[name] = sums

    def to_plain(self) -> dict[str, Any]:
        """`seconds`, and `errors`: weight -> [squared error, sum of squares]."""
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {"seconds": self.seconds, "errors": dict(zip(self._sums, values, strict=True))}


def worst_error(reports: Iterable[Mapping[str, Any]]) -> tuple[float, str] | None:
    """The largest relative error of a weight (Euclidean norm of the error over that of the weight), and which it is.

    Args:
        reports: `EncodeReport.to_plain` of processes that each quantised other rows.

    Returns:
        None where nothing was quantised.
    """
    totals: dict[str, list[float]] = {}
    for report in reports:
        for name, (error, norm) in report["errors"].items():
            total = totals.setdefault(name, [0.0, 0.0])
            total[0] += error
            total[1] += norm
    if not totals:
        return None
    # A weight of zeros is represented exactly; a NaN is worse than any number.
    relative = {name: math.sqrt(error / norm) if norm else 0.0 for name, (error, norm) in totals.items()}
    name = max(relative, key=lambda key: math.inf if math.isnan(relative[key]) else relative[key])
    return relative[name], name
