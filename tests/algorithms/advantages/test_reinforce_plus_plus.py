"""REINFORCE++ and its baseline variant against loops over Python floats."""

import math

import pytest
from algorithms.advantages import loops

from verl.algorithms.advantages.reinforce_plus_plus import (
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_plus_plus_equals_the_loop(batch, config, gamma):
    rewards, returns = batch.token_level_rewards.tolist(), {}
    for i, columns in enumerate(loops.token_columns(batch.response_mask)):
        for k, t in enumerate(columns):
            returns[i, t] = math.fsum(gamma**n * rewards[i][later] for n, later in enumerate(columns[k:]))
    config.gamma = gamma
    result = compute_reinforce_plus_plus_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, config=config
    )
    shape = batch.response_mask.shape
    loops.check_tokens(result, loops.filled(shape, loops.whitened(returns)), loops.filled(shape, returns))


def test_reinforce_plus_plus_baseline_equals_the_loop(batch):
    totals = loops.total_rewards(batch.token_level_rewards)
    scores = loops.normalized_scores(totals, batch.index, by_std=False)
    expected = loops.whitened_rows([[score] * 8 for score in scores], batch.response_mask)
    result = compute_reinforce_plus_plus_baseline_outcome_advantage(
        batch.token_level_rewards, batch.response_mask, batch.index
    )
    loops.check_outcome(result, expected)
