"""GAE against loops over Python floats."""

import math

import pytest
import torch
from algorithms.advantages import loops

from verl.algorithms.advantages.gae import compute_gae_advantage_return


def gae(batch, gamma, lam):
    """Equation 16 of the paper, summed over the tokens of the mask, and the returns."""
    rewards, values = batch.token_level_rewards.tolist(), batch.values.tolist()
    advantages, returns = {}, {}
    for i, columns in enumerate(loops.token_columns(batch.response_mask)):
        deltas = []
        for k, t in enumerate(columns):
            later = values[i][columns[k + 1]] if k + 1 < len(columns) else 0.0
            deltas.append(rewards[i][t] + gamma * later - values[i][t])
        for k, t in enumerate(columns):
            advantages[i, t] = math.fsum((gamma * lam) ** n * delta for n, delta in enumerate(deltas[k:]))
            returns[i, t] = advantages[i, t] + values[i][t]
    return advantages, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_equals_the_loop(batch, config, gamma, lam):
    shape = batch.response_mask.shape
    advantages, returns = gae(batch, gamma, lam)
    config.gamma, config.lam = gamma, lam
    expected = loops.filled(shape, loops.whitened(advantages)), loops.filled(shape, returns)
    columns = batch.token_level_rewards, batch.values, batch.response_mask
    loops.check_tokens(compute_gae_advantage_return(*columns, gamma, lam), *expected)
    loops.check_tokens(compute_gae_advantage_return(*columns, config=config), *expected)


def test_tool_text_between_tokens_does_not_change_gae():
    rewards, values = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.3, -0.2, 0.7]])
    advantages, returns = compute_gae_advantage_return(rewards, values, torch.ones(1, 3), 0.9, 0.8)
    columns = torch.tensor([0, 3, 4])
    wide_rewards, wide_values, mask = torch.zeros(1, 6), torch.full((1, 6), 50.0), torch.zeros(1, 6)
    wide_rewards[:, columns], wide_values[:, columns], mask[:, columns] = rewards, values, 1.0
    wide_advantages, wide_returns = compute_gae_advantage_return(wide_rewards, wide_values, mask, 0.9, 0.8)
    assert torch.equal(wide_advantages[:, columns], advantages)
    assert torch.equal(wide_returns[:, columns], returns)
