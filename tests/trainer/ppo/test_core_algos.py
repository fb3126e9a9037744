"""The registries that users extend."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.trainer.ppo import core_algos
from verl.trainer.ppo.registry import Registry


def test_built_in_entries():
    assert core_algos.get_adv_estimator_fn("grpo") is core_algos.compute_grpo_outcome_advantage
    assert core_algos.get_policy_loss_fn("vanilla") is core_algos.compute_policy_loss_vanilla


def test_a_user_function_is_found_and_called_by_keyword():
    @core_algos.register_adv_est("test_core_algos_reward_itself")
    def reward_itself(token_level_rewards, response_mask, index, config):
        advantages = token_level_rewards.sum(-1, keepdim=True) * response_mask * config.gain
        return advantages, advantages

    advantages, _ = core_algos.compute_advantage(
        "test_core_algos_reward_itself",
        torch.tensor([[0.0, 2.0]]),
        torch.tensor([[1, 1]]),
        np.array(["a"], dtype=object),
        SimpleNamespace(gain=3.0),
    )
    assert advantages.tolist() == [[6.0, 6.0]]


def test_grpo_by_name():
    rewards, mask, index = torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), np.array(["a", "a"], dtype=object)
    advantages, _ = core_algos.compute_advantage(
        "grpo", rewards, mask, index, SimpleNamespace(norm_adv_by_std_in_grpo=False)
    )
    assert advantages.flatten().tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("get", "key", "name"),
    [
        (core_algos.get_adv_estimator_fn, "algorithm.adv_estimator", "rloo"),
        (core_algos.get_policy_loss_fn, "actor_rollout_ref.actor.policy_loss.loss_mode", "gspo"),
    ],
)
def test_a_later_one_says_so_and_lists_the_known(get, key, name):
    with pytest.raises(ValueError, match=f"{key}='{name}' is not supported yet: use one of .*(grpo|vanilla)"):
        get(name)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'grppo' is not registered: use one of .*grpo"):
        core_algos.get_adv_estimator_fn("grppo")


def test_a_name_is_taken_once():
    registry = Registry("thing", "some.key")

    def one():
        return 1

    def two():
        return 2

    registry.register("a")(one)
    registry.register("a")(one)
    with pytest.raises(ValueError, match=r"thing 'a' is already registered by .*one"):
        registry.register("a")(two)
    assert registry.get("a") is one
    assert registry.names() == ["a"]
