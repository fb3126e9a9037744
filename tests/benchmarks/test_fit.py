import math

import fit
import numpy as np
import pytest


def test_a_power_law_is_recovered():
    exponent, factor = fit.power_law([1, 4, 9, 100], [3 * x**1.5 for x in (1, 4, 9, 100)])
    assert exponent == pytest.approx(1.5)
    assert factor == pytest.approx(3)


def test_the_fit_is_the_least_squares_line_of_the_logarithms():
    x, y = [1.0, 2.0, 5.0, 7.0], [1.3, 1.9, 6.1, 5.5]
    slope, offset = np.polyfit(np.log(x), np.log(y), 1)
    assert fit.power_law(x, y) == pytest.approx((slope, math.exp(offset)))


@pytest.mark.parametrize(("x", "y"), [([2, 2], [1, 3]), ([1, 2], [0, 1]), ([-1, 2], [1, 1]), ([1], [1])])
def test_points_without_an_exponent_are_an_error(x, y):
    with pytest.raises(ValueError, match="two different x"):
        fit.power_law(x, y)


def test_local_exponents_are_those_between_neighbors():
    assert fit.local_exponents([1, 2, 8], [5, 5, 20]) == pytest.approx([0.0, 1.0])
