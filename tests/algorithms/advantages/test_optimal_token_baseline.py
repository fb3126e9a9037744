"""The optimal token baselines against loops over Python floats."""

import math

import numpy as np
import pytest
import torch
from algorithms.advantages import loops

from verl.algorithms.advantages.optimal_token_baseline import (
    compute_multi_turn_optimal_token_baseline_advantage,
    compute_optimal_token_baseline_advantage,
)


def optimal_baseline(batch, weighted, zero_tail, by_turn):
    """Advantages and returns per token.

    A token is compared with the tokens of the other samples at its column or, with `by_turn`, with those that have the
    same number among the tokens of the model.
    """
    returns, columns_of = loops.rewards_to_go(batch), loops.token_columns(batch.response_mask)
    log_probs, squares = batch.old_log_probs.tolist(), batch.sum_pi_squared.tolist()
    ratios, norms = batch.rollout_is_weights.tolist(), {}
    for i, columns in enumerate(columns_of):
        for k, t in enumerate(columns):
            norms[i, t] = math.fsum(
                max(0.0, 1 - 2 * math.exp(log_probs[i][u]) + squares[i][u]) * (ratios[i][u] ** 2 if weighted else 1.0)
                for u in columns[: k + 1]
            )
    expected = {}
    for i, columns in enumerate(columns_of):
        answered = [j for j in range(len(columns_of)) if batch.index[j] == batch.index[i] and columns_of[j]]
        for k, t in enumerate(columns):
            if by_turn:
                compared = [(j, columns_of[j][k]) for j in answered if len(columns_of[j]) > k]
            else:
                compared = [(j, t) for j in answered if t in columns_of[j]]
            if len(answered) == 1 or (zero_tail and len(compared) == 1):
                expected[i, t] = returns[i, t]
                continue
            norm = math.fsum(norms[token] for token in compared)
            baseline = math.fsum(norms[token] * returns[token] for token in compared) / (norm + 1e-8)
            expected[i, t] = returns[i, t] - baseline
    return expected, returns


@pytest.mark.parametrize("zero_tail", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("estimator", "by_turn"),
    [
        (compute_optimal_token_baseline_advantage, False),
        (compute_multi_turn_optimal_token_baseline_advantage, True),
    ],
)
def test_optimal_token_baseline_equals_the_loop(batch, estimator, by_turn, weighted, zero_tail):
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
    loops.check_tokens(result, loops.filled(shape, expected), loops.filled(shape, returns))


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_certain_policy_has_no_gradient_and_no_baseline(noise):
    """1 - 2 pi + sum pi^2 is 0 there; a rounding error below 0 could cancel epsilon = 1e-8 in the divisor."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    squares = torch.ones(2, 2, dtype=torch.float64) - noise * 5
    advantages, _ = compute_optimal_token_baseline_advantage(
        rewards, torch.ones(2, 2), np.array(["a", "a"]), torch.zeros(2, 2), squares
    )
    assert advantages.tolist() == [[1.0, 1.0], [0.0, 0.0]]
