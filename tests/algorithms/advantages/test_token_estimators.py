"""Estimators with an advantage a token, against loops over Python floats."""

import math
import statistics

import numpy as np
import pytest
import torch

from verl.algorithms import advantages as adv


def tokens_of(mask):
    """Columns of the mask, a list a sample."""
    return [[t for t, m in enumerate(row) if m] for row in mask.tolist()]


def filled(shape, places):
    rows = torch.zeros(shape, dtype=torch.float64)
    for (i, t), value in places.items():
        rows[i, t] = value
    return rows


def whitened(places):
    mean, variance = statistics.fmean(places.values()), statistics.variance(places.values())
    return {place: (value - mean) / math.sqrt(variance + 1e-8) for place, value in places.items()}


def check(result, advantages, returns):
    assert result[0].dtype == result[1].dtype == torch.float32
    torch.testing.assert_close(result[0].double(), advantages, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result[1].double(), returns, rtol=1e-5, atol=1e-6)


def gae(batch, gamma, lam):
    """The sum of the paper's equation 16 over the tokens of the mask, and the returns."""
    rewards, values = batch.token_level_rewards.tolist(), batch.values.tolist()
    plain, returns = {}, {}
    for i, columns in enumerate(tokens_of(batch.response_mask)):
        deltas = []
        for k, t in enumerate(columns):
            later = values[i][columns[k + 1]] if k + 1 < len(columns) else 0.0
            deltas.append(rewards[i][t] + gamma * later - values[i][t])
        for k, t in enumerate(columns):
            plain[i, t] = math.fsum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[k:]))
            returns[i, t] = plain[i, t] + values[i][t]
    return plain, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae(batch, config, gamma, lam):
    shape = batch.response_mask.shape
    plain, returns = gae(batch, gamma, lam)
    config.gamma, config.lam = gamma, lam
    expected = filled(shape, whitened(plain)), filled(shape, returns)
    columns = batch.token_level_rewards, batch.values, batch.response_mask
    check(adv.compute_gae_advantage_return(*columns, gamma, lam), *expected)
    check(adv.compute_gae_advantage_return(*columns, config=config), *expected)


def test_gae_is_the_same_with_a_tools_text_in_between():
    rewards, values = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.3, -0.2, 0.7]])
    plain, returns = adv.compute_gae_advantage_return(rewards, values, torch.ones(1, 3), 0.9, 0.8)
    columns = torch.tensor([0, 3, 4])
    wide_rewards, wide_values, mask = torch.zeros(1, 6), torch.full((1, 6), 50.0), torch.zeros(1, 6)
    wide_rewards[:, columns], wide_values[:, columns], mask[:, columns] = rewards, values, 1.0
    wide_plain, wide_returns = adv.compute_gae_advantage_return(wide_rewards, wide_values, mask, 0.9, 0.8)
    assert torch.equal(wide_plain[:, columns], plain)
    assert torch.equal(wide_returns[:, columns], returns)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus(batch, config, gamma):
    rewards, returns = batch.token_level_rewards.tolist(), {}
    for i, columns in enumerate(tokens_of(batch.response_mask)):
        for k, t in enumerate(columns):
            returns[i, t] = math.fsum(gamma**n * rewards[i][later] for n, later in enumerate(columns[k:]))
    config.gamma = gamma
    result = adv.compute_reinforce_plus_plus_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, config=config
    )
    shape = batch.response_mask.shape
    check(result, filled(shape, whitened(returns)), filled(shape, returns))


def rewards_to_go(batch):
    rewards = batch.token_level_rewards.tolist()
    return {
        (i, t): math.fsum(rewards[i][later] for later in columns[k:])
        for i, columns in enumerate(tokens_of(batch.response_mask))
        for k, t in enumerate(columns)
    }


def test_remax(batch):
    returns, baselines = rewards_to_go(batch), batch.reward_baselines.tolist()
    expected = {(i, t): value - baselines[i] for (i, t), value in returns.items()}
    shape = batch.response_mask.shape
    result = adv.compute_remax_outcome_advantage(batch.token_level_rewards, batch.reward_baselines, batch.response_mask)
    check(result, filled(shape, expected), filled(shape, returns))


def optimal_baseline(batch, weighted, zero_tail, by_turn):
    """Advantages; a token meets the others' at its column, or (by_turn) those that are as many model tokens in."""
    returns, columns_of = rewards_to_go(batch), tokens_of(batch.response_mask)
    log_probs, squares = batch.old_log_probs.tolist(), batch.sum_pi_squared.tolist()
    ratios, energies = batch.rollout_is_weights.tolist(), {}
    for i, columns in enumerate(columns_of):
        for k, t in enumerate(columns):
            energies[i, t] = math.fsum(
                max(0.0, 1 - 2 * math.exp(log_probs[i][u]) + squares[i][u]) * (ratios[i][u] ** 2 if weighted else 1.0)
                for u in columns[: k + 1]
            )
    expected = {}
    for i, columns in enumerate(columns_of):
        answered = [j for j in range(len(columns_of)) if batch.index[j] == batch.index[i] and columns_of[j]]
        for k, t in enumerate(columns):
            if by_turn:
                met = [(j, columns_of[j][k]) for j in answered if len(columns_of[j]) > k]
            else:
                met = [(j, t) for j in answered if t in columns_of[j]]
            if len(answered) == 1 or (zero_tail and len(met) == 1):
                expected[i, t] = returns[i, t]
                continue
            energy = math.fsum(energies[place] for place in met)
            baseline = math.fsum(energies[place] * returns[place] for place in met) / (energy + 1e-8)
            expected[i, t] = returns[i, t] - baseline
    return expected, returns


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("estimator", "by_turn"),
    [
        (adv.compute_optimal_token_baseline_advantage, False),
        (adv.compute_multi_turn_optimal_token_baseline_advantage, True),
    ],
)
def test_optimal_token_baseline(batch, estimator, by_turn, weighted, zero_tail):
    expected, returns = optimal_baseline(batch, weighted, zero_tail, by_turn)
    result = estimator(
        batch.token_level_rewards,
        batch.response_mask,
        batch.index,
        batch.old_log_probs,
        batch.sum_pi_squared,
        batch.rollout_is_weights if weighted else None,
        handle_zero_tail=zero_tail,
    )
    shape = batch.response_mask.shape
    check(result, filled(shape, expected), filled(shape, returns))


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_a_certain_policy_has_no_gradient_and_no_baseline(noise):
    """1 - 2 pi + sum pi^2 is 0 there; a rounding below 0 that met epsilon = 1e-8 would divide by nothing."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    squares = torch.ones(2, 2, dtype=torch.float64) - noise * 5
    advantages, _ = adv.compute_optimal_token_baseline_advantage(
        rewards, torch.ones(2, 2), np.array(["a", "a"]), torch.zeros(2, 2), squares
    )
    assert advantages.tolist() == [[1.0, 1.0], [0.0, 0.0]]
