"""Exponents of power laws: how fast one quantity grows with another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Fit y = factor * x ** exponent by least squares of the logarithms.

    Args:
        x, y: positive numbers, with at least two different x.

    Returns:
        (exponent, factor).

    Raises:
        ValueError: there are fewer than two different x, or a number is not positive.
    """
    if len(set(x)) < 2 or min(*x, *y) <= 0:
        raise ValueError(f"x={list(x)}, y={list(y)}: a power law needs at least two different x, and positive numbers")
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_x, mean_y = sum(log_x) / len(x), sum(log_y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(log_x, log_y, strict=True))
    exponent = covariance / sum((a - mean_x) ** 2 for a in log_x)
    return exponent, math.exp(mean_y - exponent * mean_x)


def local_exponents(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """Return the exponents between neighbors. A fixed cost bends all of `power_law`, but only the first of these."""
    pairs = list(zip(x, y, strict=True))
    return [math.log(y1 / y0) / math.log(x1 / x0) for (x0, y0), (x1, y1) in itertools.pairwise(pairs)]
