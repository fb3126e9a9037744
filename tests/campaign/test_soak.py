"""The soak: a trend is told from noise."""

import numpy as np
import pytest

from campaign.soak import fit, table, trends


def line(slope, noise, count=400, mean=100.0, seed=0):
    rng = np.random.default_rng(seed)
    return [(step, mean + slope * step + noise * rng.normal()) for step in range(count)]


def test_a_fitted_line_has_the_slope_of_the_samples_and_its_error():
    trend = fit(line(0.05, 1.0))
    assert trend.slope == pytest.approx(50.0, abs=4 * trend.error)
    # Standard error of a slope: noise / sqrt(sum of squared distances from the mean step).
    assert trend.error == pytest.approx(1000 / np.sqrt(400**3 / 12), rel=0.2)
    exact = fit(line(0.05, 0.0))
    assert exact.slope == pytest.approx(50.0) and exact.error < 1e-6
    assert exact.rise == pytest.approx(0.05 * 399 / (100 + 0.05 * 399 / 2))


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_trend(seed):
    assert not fit(line(0.0, 5.0, seed=seed)).grows
    assert not fit([(step, 7.0) for step in range(100)]).grows


def test_growth_is_a_trend_unless_it_is_tiny():
    assert fit(line(0.05, 2.0)).grows
    assert not fit(line(0.001, 0.0)).grows, "0.4 % of the mean"
    assert not fit(line(-0.05, 2.0)).grows


def test_the_beginning_is_left_out():
    samples = {
        "step (s)": line(0.0, 0.0, mean=1.0),
        "driver: memory (MiB)": [(step, min(step, 50)) for step in range(400)],
    }
    found = trends(samples)
    assert not found["driver: memory (MiB)"].grows
    samples["driver: memory (MiB)"] = [(step, step) for step in range(400)]
    found = trends(samples)
    assert found["driver: memory (MiB)"].grows
    assert "| driver: memory (MiB) | 240 " in table(found) and "yes" in table(found)
