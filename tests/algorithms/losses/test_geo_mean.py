"""GMPO against a loop with the derivative by hand."""

import math

import pytest
import torch

from fixtures.loss_cases import CLIPFRAC, CONFIG, KL, LOWER, make_loss_batch, run_loss, sequence_rows
from verl.algorithms.losses.geo_mean import compute_policy_loss_geo_mean


@pytest.mark.parametrize("weighted", [False, True])
def test_geo_mean_equals_the_loop(weighted):
    batch, value, metrics = make_loss_batch(), [], []
    gradient = torch.zeros_like(batch.new)
    for row, columns, d, advantages in sequence_rows(batch):
        log_g, moves = 0.0, []
        for x, a in zip(d, advantages, strict=True):
            # the pessimistic one of d and its clipped value: the smaller for A > 0, the larger for A < 0
            binds = a == 0 or (x > 0.28 if a > 0 else x < -0.2)
            log_g += 0.0 if a == 0 else min(x, 0.28) if a > 0 else max(x, -0.2)
            moves.append(not binds)
            outside = x > 0.28 or x < -0.2
            metrics.append((outside and a > 0, outside and a < 0, -x))
        log_g /= len(d)
        mean = math.fsum(advantages) / len(d)
        weight = 1.0
        if weighted:
            weight = math.exp(math.fsum(math.log(batch.weights[row, j].item() + 1e-10) for j in columns) / len(d))
        value.append(-mean * math.exp(min(log_g, 20.0)) * weight)
        for j, moved in zip(columns, moves, strict=True):
            gradient[row, j] = value[-1] / len(d) * (moved and log_g <= 20.0)
    loss, found, grad = run_loss(compute_policy_loss_geo_mean, batch, batch.weights if weighted else None)
    assert math.isclose(loss.item(), math.fsum(value) / len(value), rel_tol=1e-9)
    torch.testing.assert_close(grad, gradient / len(value), rtol=1e-9, atol=1e-14)
    for name, column in zip((CLIPFRAC, LOWER, KL), zip(*metrics, strict=True), strict=True):
        assert math.isclose(found[name].item(), math.fsum(column) / len(column), rel_tol=1e-9), name
        assert name == KL or found[name].item() > 0.1


def test_geo_mean_of_equal_log_ratios_is_the_ratio():
    old = torch.zeros(2, 3, dtype=torch.float64)
    new, mask = old + torch.tensor([[0.1], [-0.15]]), torch.ones(2, 3)
    loss, _ = compute_policy_loss_geo_mean(old, new, torch.ones(2, 3), mask, "token-mean", CONFIG)
    assert loss.item() == pytest.approx(-(math.exp(0.1) + math.exp(-0.15)) / 2)


def test_geo_mean_ignores_loss_agg_mode():
    batch = make_loss_batch()
    by_sum = run_loss(compute_policy_loss_geo_mean, batch, mode="token-sum")
    assert by_sum[0] == run_loss(compute_policy_loss_geo_mean, batch, mode="token-mean")[0]
