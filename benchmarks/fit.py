"""How one quantity grows with another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares of log y = log factor + exponent * log x.

    Args:
        x, y: positive, at least two different x.

    Returns:
        exponent, factor.

    Raises:
        ValueError: fewer than two different x, or a number that is not positive.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x={list(x)}, y={list(y)}: a power law needs two different x at least and positive numbers")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    exponent = covariance / sum((a - mean_x) ** 2 for a in log_x)
    return exponent, math.exp(mean_y - exponent * mean_x)


def local_exponents(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """The exponent between each two neighbors, where a fixed cost at the small end would bend the whole fit."""
    pairs = list(zip(x, y, strict=True))
    return [math.log(y1 / y0) / math.log(x1 / x0) for (x0, y0), (x1, y1) in itertools.pairwise(pairs)]
