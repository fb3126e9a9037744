"""Clip-Cov and KL-Cov against loops: the selection of tokens, and the losses."""

import copy
import math
from collections import Counter

import pytest
import torch

from fixtures.loss_cases import CONFIG, check_against, make_loss_batch, tokens
from verl.algorithms.losses.covariance import (
    compute_policy_loss_clip_cov,
    compute_policy_loss_kl_cov,
    select_tokens_clip_cov,
    select_tokens_kl_cov,
)

SELECTORS = [select_tokens_clip_cov, select_tokens_kl_cov]


def covariances(batch):
    """{index: covariance} of every token."""
    indices = tokens(batch.mask)
    mean_a, mean_l = (
        math.fsum(column[p].item() for p in indices) / len(indices) for column in (batch.advantages, batch.new)
    )
    return {p: (batch.advantages[p].item() - mean_a) * (batch.new[p].item() - mean_l) for p in indices}


def is_clipped(batch, index):
    advantage = batch.advantages[index].item()
    ratio = math.exp(batch.new[index].item() - batch.old[index].item())
    return ratio > 1.28 if advantage > 0 else ratio < 0.8 if advantage < 0 else False


def selected_indices(select, batch, seed=0, **changes):
    config = copy.deepcopy(CONFIG)
    vars(config.policy_loss).update(changes)
    selected = select(batch.new, batch.old, batch.advantages, batch.mask, config, seed)
    assert selected.dtype == torch.bool and selected.shape == batch.mask.shape
    return {(i, j) for i, j in selected.nonzero().tolist()}


def eligible(batch):
    return {p for p, c in covariances(batch).items() if 1.0 < c < 20.5 and not is_clipped(batch, p)}


def test_clip_cov_selects_a_share_of_all_tokens_from_the_band():
    batch = make_loss_batch()
    possible, count = eligible(batch), int(0.05 * len(tokens(batch.mask)))
    covariance = covariances(batch)
    assert any(c >= 20.5 for c in covariance.values())
    assert any(1.0 < c < 20.5 and is_clipped(batch, p) for p, c in covariance.items())
    assert 1 < count < len(possible)
    picked = selected_indices(select_tokens_clip_cov, batch)
    assert len(picked) == count and picked <= possible
    assert selected_indices(select_tokens_clip_cov, batch, clip_cov_ratio=1.0) == possible
    assert len(selected_indices(select_tokens_clip_cov, batch, clip_cov_ratio=1e-6)) == 1
    assert selected_indices(select_tokens_clip_cov, batch, clip_cov_lb=1e3, clip_cov_ub=2e3) == set()


def test_clip_cov_selection_is_random_and_depends_on_the_seed_only():
    batch = make_loss_batch()
    picks = [selected_indices(select_tokens_clip_cov, batch, seed) for seed in range(300)]
    assert picks[7] == selected_indices(select_tokens_clip_cov, batch, 7)
    possible, counts = eligible(batch), Counter(index for picked in picks for index in picked)
    mean = 300 * len(picks[0]) / len(possible)
    # binomial: 5 std
    assert set(counts) == possible
    assert all(abs(count - mean) < 5 * math.sqrt(mean) for count in counts.values())


def test_kl_cov_selects_the_highest_covariances():
    batch = make_loss_batch()
    covariance = covariances(batch)
    count = int(len(covariance) * 0.1)
    assert count > 1
    ranked = sorted(covariance, key=lambda index: -covariance[index])
    assert selected_indices(select_tokens_kl_cov, batch) == set(ranked[:count])
    assert selected_indices(select_tokens_kl_cov, batch, seed=5) == set(ranked[:count])
    assert selected_indices(select_tokens_kl_cov, batch, kl_cov_ratio=1e-6) == {ranked[0]}


def test_kl_cov_selects_the_first_of_equal_covariances():
    batch = make_loss_batch()
    batch.advantages[:] = 1.0
    assert selected_indices(select_tokens_kl_cov, batch) == set(tokens(batch.mask)[: int(batch.mask.sum() * 0.1)])


@pytest.mark.parametrize("select", SELECTORS)
def test_padding_does_not_change_the_selection(select):
    batch = make_loss_batch()
    before = selected_indices(select, batch)
    rng = torch.Generator().manual_seed(9)
    for name in ("old", "new", "advantages"):
        values = getattr(batch, name)
        noise = torch.randn(values.shape, generator=rng, dtype=values.dtype)
        padded = torch.where(batch.mask.bool(), values, noise)
        setattr(batch, name, torch.nn.functional.pad(padded, (0, 4), value=-3.0))
    batch.mask = torch.nn.functional.pad(batch.mask, (0, 4))
    assert selected_indices(select, batch) == before


@pytest.mark.parametrize("select", SELECTORS)
def test_batch_without_a_token_has_no_selection(select):
    batch = make_loss_batch()
    batch.mask[:] = 0
    assert selected_indices(select, batch) == set()


@pytest.mark.parametrize("weighted", [False, True])
def test_clip_cov_loss_equals_the_loop(weighted):
    batch, expected = make_loss_batch(), {}
    picked = selected_indices(select_tokens_clip_cov, batch)
    for index in tokens(batch.mask):
        advantage = batch.advantages[index].item()
        d = batch.new[index].item() - batch.old[index].item()
        ratio = math.exp(min(max(d, -20.0), 20.0))
        bounded = min(max(ratio, 0.8), 1.28)
        loss, slope = -advantage * ratio, -advantage * ratio * (-20.0 <= d <= 20.0)
        if -advantage * bounded > loss:
            loss, slope = -advantage * bounded, 0.0
        if index in picked:
            loss, slope = 0.0, 0.0
        expected[index] = loss, slope, {"actor/pg_clipfrac": index in picked, "actor/ppo_kl": -d}
    _check(compute_policy_loss_clip_cov, batch, picked, expected, weighted)


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_cov_loss_equals_the_loop(weighted):
    batch, expected = make_loss_batch(), {}
    picked = selected_indices(select_tokens_kl_cov, batch)
    for index in tokens(batch.mask):
        advantage = batch.advantages[index].item()
        d = batch.new[index].item() - batch.old[index].item()
        ratio = math.exp(min(max(d, -20.0), 20.0))
        loss, slope = -advantage * ratio, -advantage * ratio * (-20.0 <= d <= 20.0)
        if index in picked:
            loss, slope = loss + 0.7 * abs(d), slope + 0.7 * math.copysign(1, d)
        expected[index] = loss, slope, {"actor/ppo_kl": abs(d)}
    _check(compute_policy_loss_kl_cov, batch, picked, expected, weighted)


def _check(function, batch, picked, expected, weighted):
    new = batch.new.clone().requires_grad_()
    selected = torch.zeros_like(batch.mask)
    for index in picked:
        selected[index] = 1
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
def test_missing_selection_is_an_error(function, name):
    batch = make_loss_batch()
    with pytest.raises(ValueError, match=rf"selected_tokens=None.*get_token_selector\('{name}'\)"):
        function(batch.old, batch.new, batch.advantages, batch.mask, "token-mean", CONFIG)
