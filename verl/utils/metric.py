"""Reduction of lists of metrics, under upstream verl's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def reduce_metrics(metrics: Mapping[str, Sequence[float] | Any]) -> dict[str, float]:
    """Return one number per metric: the maximum if its name contains "max", the minimum for "min", else the mean.

    Raises:
        ValueError: a metric has no value; the message names it.
    """
    reduced = {}
    for name, values in metrics.items():
        if np.size(values) == 0:
            raise ValueError(f"reduce_metrics: the metric {name!r} has no value; leave it out")
        reduce = np.max if "max" in name else np.min if "min" in name else np.mean
        reduced[name] = float(reduce(np.asarray(values, dtype=np.float64)))
    return reduced
