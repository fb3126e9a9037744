"""The two DPPO losses against a loop over tokens with the derivative by hand."""

import math

import pytest
import torch

from fixtures.loss_cases import CLIPFRAC, CONFIG, KL, LOWER, bounded_ratio, check_token_loss, make_loss_batch
from verl.algorithms.losses.dppo import compute_policy_loss_dppo_kl, compute_policy_loss_dppo_tv


def dppo(old, new, advantage, inside):
    ratio, _, kl = bounded_ratio(old, new)
    if not inside:
        return 0.0, 0.0, {KL: kl, CLIPFRAC: 1.0}
    weight = min(ratio, 3.0)
    return -advantage * weight * new, -advantage * weight, {KL: kl, LOWER: ratio > 3.0}


def dppo_tv(old, new, advantage):
    change = math.exp(new) - math.exp(old)
    return dppo(old, new, advantage, change <= 0.28 if advantage > 0 else change >= -0.2)


def dppo_kl(old, new, advantage):
    p, q = math.exp(new), math.exp(old)
    divergence = q * (old - new) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
    inside = divergence <= 0.28 or p <= q if advantage > 0 else divergence <= 0.2 or p >= q
    return dppo(old, new, advantage, inside)


REFERENCES = {compute_policy_loss_dppo_tv: dppo_tv, compute_policy_loss_dppo_kl: dppo_kl}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("function", REFERENCES)
def test_dppo_equals_the_loop(function, weighted):
    metrics = check_token_loss(function, REFERENCES[function], "token-mean", weighted)
    assert set(metrics) == {CLIPFRAC, LOWER, KL}


@pytest.mark.parametrize("function", REFERENCES)
def test_batch_has_tokens_inside_and_outside_the_bounds_of_dppo(function):
    batch = make_loss_batch()
    _, metrics = function(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", CONFIG)
    assert 0.1 < metrics[CLIPFRAC].item() < 0.9
    assert metrics[LOWER].item() > 0


def test_dppo_kl_is_finite_for_a_log_probability_above_zero_by_rounding():
    old, new = torch.tensor([[-1e-7, 1e-7]]), torch.tensor([[1e-7, -0.5]], requires_grad=True)
    advantages, ones = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    loss, metrics = compute_policy_loss_dppo_kl(old, new, advantages, ones, "token-mean", CONFIG)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()
    # the first token keeps its probability; the second one falls from probability 1 to 0.6, a large divergence
    assert metrics[CLIPFRAC].item() == 0.5


@pytest.mark.parametrize(("old_prob", "outside"), [(0.980, 0.0), (0.979, 1.0)])
def test_dppo_kl_at_probability_one(old_prob, outside):
    # 0.98 log 0.98 + 0.02 log(0.02 / 1e-8) = 0.270, 0.979 log 0.979 + 0.021 log(0.021 / 1e-8) = 0.285; the bound: 0.28
    old, one = torch.tensor([[old_prob]], dtype=torch.float64).log(), torch.ones(1, 1)
    _, metrics = compute_policy_loss_dppo_kl(old, torch.zeros_like(old), one, one, "token-mean", CONFIG)
    assert metrics[CLIPFRAC].item() == outside
