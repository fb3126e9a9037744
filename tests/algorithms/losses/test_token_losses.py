"""Losses whose tokens do not know of each other, against a loop over tokens with derivatives by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from fixtures.loss_cases import CONFIG, check_against, make_loss_batch, tokens
from verl.algorithms.losses.registry import get_policy_loss_fn

CLIPFRAC, LOWER, KL = "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"


def bounded_ratio(old, new):
    """The ratio, its derivative by `new`, and the kl metric."""
    log_ratio = min(max(new - old, -20.0), 20.0)
    return math.exp(log_ratio), math.exp(log_ratio) * (-20.0 <= new - old <= 20.0), -log_ratio


def sapo(old, new, advantage):
    ratio, slope, kl = bounded_ratio(old, new)
    tau = 1.3 if advantage > 0 else 2.1
    argument = tau * (ratio - 1)
    sigmoid = 1 / (1 + math.exp(-argument)) if argument < 700 else 1.0
    gate, by_ratio = 4 / tau * sigmoid, 4 * sigmoid * (1 - sigmoid)
    return -gate * advantage, -advantage * by_ratio * slope, {KL: kl}


def gpg(old, new, advantage):
    return -new * advantage, -advantage, {KL: old - new}


def cispo(old, new, advantage):
    ratio, _, kl = bounded_ratio(old, new)
    weight = 1.28 if ratio > 1.28 else 0.8 if ratio < 0.8 else ratio
    return -weight * advantage * new, -weight * advantage, {KL: kl, CLIPFRAC: weight != ratio}


def dro(old, new, advantage):
    distance = new - old
    return -(advantage * new - 0.05 / 2 * distance**2), -advantage + 0.05 * distance, {KL: -distance}


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


REFERENCES = {
    "sapo": (sapo, "seq-mean-token-mean"),
    "gpg": (gpg, "token-mean"),
    "cispo": (cispo, "token-mean"),
    "dro": (dro, "token-mean"),
    "dppo_tv": (dppo_tv, "token-mean"),
    "dppo_kl": (dppo_kl, "token-mean"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_value_gradient_and_metrics(name, weighted):
    reference, mode = REFERENCES[name]
    batch = make_loss_batch()
    new = batch.new.clone().requires_grad_()
    weights = batch.weights if weighted else None
    loss, metrics = get_policy_loss_fn(name)(
        batch.old, new, batch.advantages, batch.mask, "token-mean", CONFIG, weights
    )
    loss.backward()
    expected = {
        place: reference(*(column[place].item() for column in (batch.old, batch.new, batch.advantages)))
        for place in tokens(batch.mask)
    }
    check_against(batch, (loss, metrics, new.grad), expected, mode, weighted)
    assert set(metrics) == ({KL} if name in ("gpg", "dro") else {CLIPFRAC, LOWER, KL})


@pytest.mark.parametrize("name", ["cispo", "dppo_tv", "dppo_kl"])
def test_both_sides_of_the_bounds_are_in_the_batch(name):
    batch = make_loss_batch()
    _, metrics = get_policy_loss_fn(name)(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", CONFIG)
    assert 0.1 < metrics[CLIPFRAC].item() < 0.9
    assert name == "cispo" or metrics[LOWER].item() > 0


def test_dppo_kl_survives_a_log_probability_above_zero_by_rounding():
    old, new = torch.tensor([[-1e-7, 1e-7]]), torch.tensor([[1e-7, -0.5]], requires_grad=True)
    advantages, ones = torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    loss, metrics = get_policy_loss_fn("dppo_kl")(old, new, advantages, ones, "token-mean", CONFIG)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()
    # the first one stayed where it was; the second one fell from probability 1 to 0.6, a large divergence
    assert metrics[CLIPFRAC].item() == 0.5


@pytest.mark.parametrize(("old_prob", "outside"), [(0.980, 0.0), (0.979, 1.0)])
def test_dppo_kl_at_probability_one(old_prob, outside):
    # 0.98 log 0.98 + 0.02 log(0.02 / 1e-8) = 0.270, 0.979 log 0.979 + 0.021 log(0.021 / 1e-8) = 0.285; the bound: 0.28
    old, one = torch.tensor([[old_prob]], dtype=torch.float64).log(), torch.ones(1, 1)
    _, metrics = get_policy_loss_fn("dppo_kl")(old, torch.zeros_like(old), one, one, "token-mean", CONFIG)
    assert metrics[CLIPFRAC].item() == outside


@pytest.mark.parametrize("beta", [None, 0.0, -1.0])
def test_dro_needs_its_coefficient(beta):
    batch = make_loss_batch()
    config = SimpleNamespace(policy_loss=SimpleNamespace(dro_beta=beta))
    with pytest.raises(ValueError, match=rf"policy_loss\.dro_beta={beta}: .* above 0"):
        get_policy_loss_fn("dro")(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", config)
