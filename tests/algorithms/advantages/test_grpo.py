"""GRPO advantages against a float64 loop."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.algorithms.advantages.grpo import compute_grpo_outcome_advantage


def reference(rewards, mask, index, by_std):
    """Advantages, one sample at a time, in Python floats."""
    totals = [math.fsum(float(x) for x in row) for row in rewards]
    rows = []
    for i, total in enumerate(totals):
        group = [t for t, uid in zip(totals, index, strict=True) if uid == index[i]]
        if len(group) == 1:
            mean, std = 0.0, 1.0
        else:
            mean = math.fsum(group) / len(group)
            std = math.sqrt(math.fsum((t - mean) ** 2 for t in group) / (len(group) - 1))
        value = (total - mean) / (std + 1e-6) if by_std else total - mean
        rows.append([value * float(m) for m in mask[i]])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    index = np.array(["a", "b", "a", "lonely", "b", "a", "b", "flat", "flat", "flat"], dtype=object)
    mask = (torch.rand(10, 6, generator=generator) > 0.3).long()
    mask[4] = 0
    rewards = torch.randn(10, 6, generator=generator)
    rewards[7:] = 0.0
    rewards[7:, 5] = 0.1
    return rewards, mask, index


@pytest.mark.parametrize("by_std", [True, False])
def test_grpo_equals_the_loop(batch, by_std):
    rewards, mask, index = batch
    advantages, returns = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=by_std)
    expected = reference(rewards.tolist(), mask.tolist(), index, by_std)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(advantages, returns)
    assert advantages.data_ptr() != returns.data_ptr()


def test_group_of_one_keeps_its_reward(batch):
    rewards, mask, index = batch
    advantages, _ = compute_grpo_outcome_advantage(rewards, mask, index)
    expected = rewards[3].double().sum() / (1 + 1e-6) * mask[3]
    torch.testing.assert_close(advantages[3].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reward", [0.1, 1e6 + 0.1, -1 / 3])
def test_equal_rewards_give_no_advantage(reward):
    """In float32 the mean of 7 equal rewards has a rounding error, which the division by 1e-6 would amplify."""
    rewards = torch.full((7, 1), reward)
    advantages, _ = compute_grpo_outcome_advantage(rewards, torch.ones(7, 3), np.array(["x"] * 7, dtype=object))
    assert advantages.abs().max() < 1e-3
    rewards = torch.tensor([[0.1]] * 7)
    advantages, _ = compute_grpo_outcome_advantage(rewards, torch.ones(7, 3), np.array(["x"] * 7, dtype=object))
    assert advantages.abs().max() < 1e-9


def test_config_replaces_the_argument_norm_adv_by_std_in_grpo(batch):
    rewards, mask, index = batch
    config = SimpleNamespace(norm_adv_by_std_in_grpo=False)
    with_config, _ = compute_grpo_outcome_advantage(rewards, mask, index, config=config)
    with_argument, _ = compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=False)
    assert torch.equal(with_config, with_argument)


def test_group_ids_may_be_integers():
    rewards = torch.tensor([[1.0], [0.0], [3.0], [5.0]])
    advantages, _ = compute_grpo_outcome_advantage(
        rewards, torch.ones(4, 1), np.array([10, 10, 2, 2]), norm_adv_by_std_in_grpo=False
    )
    assert advantages.flatten().tolist() == [0.5, -0.5, -1.0, 1.0]


def test_wrong_number_of_group_ids_is_an_error():
    with pytest.raises(ValueError, match="3 group ids for 4 samples"):
        compute_grpo_outcome_advantage(torch.zeros(4, 1), torch.ones(4, 1), np.array(["a"] * 3))
