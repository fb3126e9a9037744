"""GSPO and GMPO, whose ratio belongs to a sequence, against loops with derivatives by hand."""

import math

import pytest
import torch

from fixtures.loss_cases import CONFIG, check_against, make_loss_batch, tokens
from verl.algorithms.losses.geo_mean import compute_policy_loss_geo_mean
from verl.algorithms.losses.gspo import compute_policy_loss_gspo

CLIPFRAC, LOWER, KL = "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"


def rows_of(batch):
    """(row, columns, d and advantage of each token) of every sequence that is not empty."""
    places = tokens(batch.mask)
    for row in sorted({i for i, _ in places}):
        columns = [j for i, j in places if i == row]
        d = [batch.new[row, j].item() - batch.old[row, j].item() for j in columns]
        yield row, columns, d, [batch.advantages[row, j].item() for j in columns]


def run(function, batch, weights=None, mode="token-mean"):
    new = batch.new.clone().requires_grad_()
    loss, metrics = function(batch.old, new, batch.advantages, batch.mask, mode, CONFIG, weights)
    loss.backward()
    return loss, metrics, new.grad


@pytest.mark.parametrize("weighted", [False, True])
def test_gspo(weighted):
    batch, expected = make_loss_batch(), {}
    for row, columns, d, advantages in rows_of(batch):
        log_s = math.fsum(d) / len(d)
        s, slope = math.exp(min(log_s, 10.0)), math.exp(log_s) if log_s <= 10.0 else 0.0
        for j, x, a in zip(columns, d, advantages, strict=True):
            clipped = min(max(s, 0.8), 1.28)
            binds = -a * clipped > -a * s
            expected[row, j] = (
                -a * clipped if binds else -a * s,
                0.0 if binds else -a * slope,
                {CLIPFRAC: binds, KL: -x},
            )
    results = run(compute_policy_loss_gspo, batch, batch.weights if weighted else None)
    check_against(batch, results, expected, "seq-mean-token-mean", weighted)
    assert 0.1 < results[1][CLIPFRAC].item() < 0.9


@pytest.mark.parametrize("weighted", [False, True])
def test_geo_mean(weighted):
    batch, value, metrics = make_loss_batch(), [], []
    gradient = torch.zeros_like(batch.new)
    for row, columns, d, advantages in rows_of(batch):
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
    loss, found, grad = run(compute_policy_loss_geo_mean, batch, batch.weights if weighted else None)
    assert math.isclose(loss.item(), math.fsum(value) / len(value), rel_tol=1e-9)
    torch.testing.assert_close(grad, gradient / len(value), rtol=1e-9, atol=1e-14)
    for name, column in zip((CLIPFRAC, LOWER, KL), zip(*metrics, strict=True), strict=True):
        assert math.isclose(found[name].item(), math.fsum(column) / len(column), rel_tol=1e-9), name
        assert name == KL or found[name].item() > 0.1


def test_equal_log_ratios_make_geo_mean_the_plain_ratio():
    old = torch.zeros(2, 3, dtype=torch.float64)
    new, mask = old + torch.tensor([[0.1], [-0.15]]), torch.ones(2, 3)
    loss, _ = compute_policy_loss_geo_mean(old, new, torch.ones(2, 3), mask, "token-mean", CONFIG)
    assert loss.item() == pytest.approx(-(math.exp(0.1) + math.exp(-0.15)) / 2)


@pytest.mark.parametrize("function", [compute_policy_loss_gspo, compute_policy_loss_geo_mean])
def test_the_aggregation_is_their_own(function):
    batch = make_loss_batch()
    assert run(function, batch, mode="token-sum")[0] == run(function, batch, mode="token-mean")[0]
