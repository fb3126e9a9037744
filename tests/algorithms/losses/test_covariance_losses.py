"""Clip-Cov and KL-Cov: which tokens are chosen, and what becomes of them, against loops."""

import copy
import math
from collections import Counter

import pytest
import torch

from fixtures.loss_cases import CONFIG, check_against, make_loss_batch, tokens
from verl.algorithms.losses.clip_cov import compute_policy_loss_clip_cov, select_tokens_clip_cov
from verl.algorithms.losses.kl_cov import compute_policy_loss_kl_cov, select_tokens_kl_cov

SELECTORS = [select_tokens_clip_cov, select_tokens_kl_cov]


def covariances(batch):
    """{place: covariance} of every token."""
    places = tokens(batch.mask)
    mean_a, mean_l = (
        math.fsum(column[p].item() for p in places) / len(places) for column in (batch.advantages, batch.new)
    )
    return {p: (batch.advantages[p].item() - mean_a) * (batch.new[p].item() - mean_l) for p in places}


def is_clipped(batch, place):
    advantage = batch.advantages[place].item()
    ratio = math.exp(batch.new[place].item() - batch.old[place].item())
    return ratio > 1.28 if advantage > 0 else ratio < 0.8 if advantage < 0 else False


def chosen(select, batch, seed=0, **changes):
    config = copy.deepcopy(CONFIG)
    vars(config.policy_loss).update(changes)
    selected = select(batch.new, batch.old, batch.advantages, batch.mask, config, seed)
    assert selected.dtype == torch.bool and selected.shape == batch.mask.shape
    return {(i, j) for i, j in selected.nonzero().tolist()}


def eligible(batch):
    return {p for p, c in covariances(batch).items() if 1.0 < c < 20.5 and not is_clipped(batch, p)}


def test_clip_cov_takes_a_share_of_all_tokens_from_the_band():
    batch = make_loss_batch()
    possible, count = eligible(batch), int(0.05 * len(tokens(batch.mask)))
    covariance = covariances(batch)
    assert any(c >= 20.5 for c in covariance.values())
    assert any(1.0 < c < 20.5 and is_clipped(batch, p) for p, c in covariance.items())
    assert 1 < count < len(possible)
    picked = chosen(select_tokens_clip_cov, batch)
    assert len(picked) == count and picked <= possible
    assert chosen(select_tokens_clip_cov, batch, clip_cov_ratio=1.0) == possible
    assert len(chosen(select_tokens_clip_cov, batch, clip_cov_ratio=1e-6)) == 1
    assert chosen(select_tokens_clip_cov, batch, clip_cov_lb=1e3, clip_cov_ub=2e3) == set()


def test_clip_cov_chooses_at_random_by_the_seed_alone():
    batch = make_loss_batch()
    picks = [chosen(select_tokens_clip_cov, batch, seed) for seed in range(300)]
    assert picks[7] == chosen(select_tokens_clip_cov, batch, 7)
    possible, counts = eligible(batch), Counter(place for picked in picks for place in picked)
    mean = 300 * len(picks[0]) / len(possible)
    # binomial: 5 standard deviations
    assert set(counts) == possible
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in counts.values())


def test_kl_cov_takes_the_highest():
    batch = make_loss_batch()
    covariance = covariances(batch)
    count = int(len(covariance) * 0.1)
    assert count > 1
    ranked = sorted(covariance, key=lambda place: -covariance[place])
    assert chosen(select_tokens_kl_cov, batch) == set(ranked[:count])
    assert chosen(select_tokens_kl_cov, batch, seed=5) == set(ranked[:count])
    assert chosen(select_tokens_kl_cov, batch, kl_cov_ratio=1e-6) == {ranked[0]}


def test_kl_cov_takes_the_first_of_equal_ones():
    batch = make_loss_batch()
    batch.advantages[:] = 1.0
    assert chosen(select_tokens_kl_cov, batch) == set(tokens(batch.mask)[: int(batch.mask.sum() * 0.1)])


@pytest.mark.parametrize("select", SELECTORS)
def test_padding_does_not_change_the_choice(select):
    batch = make_loss_batch()
    before = chosen(select, batch)
    rng = torch.Generator().manual_seed(9)
    for name in ("old", "new", "advantages"):
        values = getattr(batch, name)
        noise = torch.randn(values.shape, generator=rng, dtype=values.dtype)
        padded = torch.where(batch.mask.bool(), values, noise)
        setattr(batch, name, torch.nn.functional.pad(padded, (0, 4), value=-3.0))
    batch.mask = torch.nn.functional.pad(batch.mask, (0, 4))
    assert chosen(select, batch) == before


@pytest.mark.parametrize("select", SELECTORS)
def test_a_batch_without_a_token(select):
    batch = make_loss_batch()
    batch.mask[:] = 0
    assert chosen(select, batch) == set()


@pytest.mark.parametrize("weighted", [False, True])
def test_clip_cov_loss(weighted):
    batch, expected = make_loss_batch(), {}
    picked = chosen(select_tokens_clip_cov, batch)
    for place in tokens(batch.mask):
        advantage = batch.advantages[place].item()
        d = batch.new[place].item() - batch.old[place].item()
        ratio = math.exp(min(max(d, -20.0), 20.0))
        bounded = min(max(ratio, 0.8), 1.28)
        loss, slope = -advantage * ratio, -advantage * ratio * (-20.0 <= d <= 20.0)
        if -advantage * bounded > loss:
            loss, slope = -advantage * bounded, 0.0
        if place in picked:
            loss, slope = 0.0, 0.0
        expected[place] = loss, slope, {"actor/pg_clipfrac": place in picked, "actor/ppo_kl": -d}
    _check(compute_policy_loss_clip_cov, batch, picked, expected, weighted)


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_cov_loss(weighted):
    batch, expected = make_loss_batch(), {}
    picked = chosen(select_tokens_kl_cov, batch)
    for place in tokens(batch.mask):
        advantage = batch.advantages[place].item()
        d = batch.new[place].item() - batch.old[place].item()
        ratio = math.exp(min(max(d, -20.0), 20.0))
        loss, slope = -advantage * ratio, -advantage * ratio * (-20.0 <= d <= 20.0)
        if place in picked:
            loss, slope = loss + 0.7 * abs(d), slope + 0.7 * math.copysign(1, d)
        expected[place] = loss, slope, {"actor/ppo_kl": abs(d)}
    _check(compute_policy_loss_kl_cov, batch, picked, expected, weighted)


def _check(function, batch, picked, expected, weighted):
    new = batch.new.clone().requires_grad_()
    selected = torch.zeros_like(batch.mask)
    for place in picked:
        selected[place] = 1
    loss, metrics = function(
        batch.old,
        new,
        batch.advantages,
        batch.mask,
        "token-mean",
        CONFIG,
        batch.weights if weighted else None,
        selected_tokens=selected,
    )
    loss.backward()
    assert set(metrics) == set(next(iter(expected.values()))[2])
    check_against(batch, (loss, metrics, new.grad), expected, "token-mean", weighted)


@pytest.mark.parametrize(
    ("function", "name"), [(compute_policy_loss_clip_cov, "clip_cov"), (compute_policy_loss_kl_cov, "kl_cov")]
)
def test_the_choice_has_to_be_given(function, name):
    batch = make_loss_batch()
    with pytest.raises(ValueError, match=rf"selected_tokens=None.*get_token_selector\('{name}'\)"):
        function(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", CONFIG)
