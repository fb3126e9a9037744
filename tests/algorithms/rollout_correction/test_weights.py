"""Importance weights against loops."""

import math

import pytest
import torch
from algorithms.rollout_correction import loops

from verl.algorithms.rollout_correction import apply_rollout_correction, importance_weights
from verl.config.rollout_correction import Band, Correction

BOUNDS = [(Band(0.5, 2.0), False), (Band(0.2, 5.0), False), (Band(0.5, 5.0), True), (Band(0.9, 1.1), True)]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("band", "zero"), BOUNDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_equal_the_loop(level, band, zero, normalize):
    log_pi, log_mu, mask = loops.make_batch()
    rows = loops.rows_of(log_pi, log_mu, mask)
    expected = loops.weights(rows, level, band.lo, band.hi, zero)
    by = loops.factor(expected, level) if normalize else 1.0
    weights, kept, _ = apply_rollout_correction(log_pi, log_mu, mask, Correction(level, band, zero, normalize))
    torch.testing.assert_close(weights, loops.spread(expected, mask).div(by).float())
    assert torch.equal(kept, mask)
    # the case has weights inside and outside the bounds, and a mean other than 1
    assert len({round(w, 9) for row in expected for w in row}) > 2
    assert not normalize or abs(by - 1) > 1e-3


def test_weight_is_the_probability_of_the_trainer_over_that_of_the_rollout():
    log_pi, log_mu = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.5, 0.4]]).log()
    mask = torch.ones(1, 2)
    band = Band(0.1, 10.0)
    token = importance_weights(log_pi, log_mu, mask, Correction("token", band))
    torch.testing.assert_close(token, torch.tensor([[1.2, 0.5]]))
    sequence = importance_weights(log_pi, log_mu, mask, Correction("sequence", band))
    torch.testing.assert_close(sequence, torch.tensor([[0.6, 0.6]]))


def test_band_includes_its_bounds():
    log_mu = torch.zeros(1, 4, dtype=torch.float64)
    log_pi = torch.tensor([[0.25, 0.2499, 4.0, 4.001]], dtype=torch.float64).log()
    log_pi[0, 0], log_pi[0, 2] = -2 * math.log(2), 2 * math.log(2)
    weights = importance_weights(log_pi, log_mu, torch.ones(1, 4), Correction("token", Band(0.25, 4.0), True))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.0, 4.0, 0.0]], dtype=torch.float64))


def test_weights_of_distant_policies_are_finite():
    log_pi, log_mu = torch.tensor([[100.0, -100.0]]), torch.zeros(1, 2)
    weights = importance_weights(log_pi, log_mu, torch.ones(1, 2), Correction("token", Band(1e-30, 1e30)))
    torch.testing.assert_close(weights, torch.tensor([[math.exp(20), math.exp(-20)]]))


def test_weights_have_no_gradient_and_are_none_without_rollout_is():
    log_pi = torch.full((2, 3), -1.0, requires_grad=True)
    log_mu, mask = torch.full((2, 3), -1.5), torch.ones(2, 3)
    weights = importance_weights(log_pi, log_mu, mask, Correction("sequence"))
    assert not weights.requires_grad
    assert importance_weights(log_pi, log_mu, mask, Correction()) is None


def test_weights_that_are_all_0_are_not_divided():
    log_pi, log_mu = torch.full((2, 3), 3.0), torch.zeros(2, 3)
    correction = Correction("token", Band(0.5, 2.0), True, rollout_is_batch_normalize=True)
    weights, _, metrics = apply_rollout_correction(log_pi, log_mu, torch.ones(2, 3), correction)
    assert torch.equal(weights, torch.zeros(2, 3))
    assert metrics["rollout_corr/rollout_is_batch_norm_factor"] == 1.0
    assert metrics["rollout_corr/rollout_is_eff_sample_size"] == 0.0
