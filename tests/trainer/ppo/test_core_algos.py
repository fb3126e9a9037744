"""The public names of the algorithms: user functions and built-in entries."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.ppo import core_algos


def batch_of(rewards, uids):
    """A batch whose columns are all tokens of the model."""
    rewards = torch.tensor(rewards)
    tensors = {"token_level_rewards": rewards, "response_mask": torch.ones_like(rewards)}
    return DataProto.from_dict(tensors=tensors, non_tensors={"uid": np.array(uids, dtype=object)})


def test_built_in_entries_are_registered():
    assert core_algos.get_adv_estimator_fn("grpo") is core_algos.compute_grpo_outcome_advantage
    assert core_algos.get_policy_loss_fn("vanilla") is core_algos.compute_policy_loss_vanilla


def test_user_estimator_is_called_by_keyword():
    @core_algos.register_adv_est("test_core_algos_reward_itself")
    def reward_itself(token_level_rewards, response_mask, index, config):
        advantages = token_level_rewards.sum(-1, keepdim=True) * response_mask * config.gain
        return advantages, advantages

    advantages, _ = core_algos.compute_advantage(
        "test_core_algos_reward_itself", batch_of([[0.0, 2.0]], ["a"]), SimpleNamespace(gain=3.0)
    )
    assert advantages.tolist() == [[6.0, 6.0]]


def test_grpo_is_computed_by_name():
    batch = batch_of([[1.0], [0.0]], ["a", "a"])
    advantages, _ = core_algos.compute_advantage("grpo", batch, SimpleNamespace(norm_adv_by_std_in_grpo=False))
    assert advantages.flatten().tolist() == [0.5, -0.5]


def test_unknown_estimator_is_an_error_that_lists_the_registered_names():
    with pytest.raises(ValueError, match=r"'grppo' is not registered: use one of .*grpo"):
        core_algos.get_adv_estimator_fn("grppo")


ONES = torch.ones(2, 3)
NAN_OUTSIDE, NAN_INSIDE = ONES.clone(), ONES.clone()
NAN_OUTSIDE[1, 2] = NAN_INSIDE[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((ONES, ONES), None),
        ((NAN_OUTSIDE, ONES), None),
        (ONES, "returned a Tensor; return a tuple (advantages, returns)"),
        ((ONES, ONES, ONES), "returned a tuple of 3 values"),
        ((ONES, None), "returned returns of type NoneType"),
        ((torch.ones(2), ONES), "returned advantages of shape [2]; return a tensor [B, T], here [2, 3]"),
        ((NAN_INSIDE, ONES), "returned advantages with NaN or infinite values"),
    ],
)
def test_the_result_of_an_estimator_is_checked(monkeypatch, returned, words):
    monkeypatch.setattr(core_algos.advantages.common.ADV_ESTIMATORS, "_functions", {"mine": lambda **_: returned})
    batch = batch_of([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], ["a", "a"])
    batch.batch["response_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    if words is None:
        assert core_algos.compute_advantage("mine", batch, SimpleNamespace()) == returned
        return
    with pytest.raises(ValueError) as raised:
        core_algos.compute_advantage("mine", batch, SimpleNamespace())
    assert str(raised.value).startswith("algorithm.adv_estimator=mine ") and words in str(raised.value)
