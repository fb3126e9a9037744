"""Rewards and advantages with upstream verl's arguments; expected values are computed by hand."""

import math

import numpy as np
import pytest
import torch

from verl import DataProto
from verl.algorithms.kl_in_reward import AdaptiveKLController, FixedKLController
from verl.config import AlgorithmConfig
from verl.trainer.ppo.core_algos import AdvantageEstimator, register_adv_est
from verl.trainer.ppo.ray_trainer import apply_kl_penalty, compute_advantage
from verl.trainer.ppo.rewards_to_advantages import compute_rewards


def batch(uid=("a", "a"), **changes):
    """Two samples with three response tokens; the last token of the second one is padding."""
    tensors = {
        "responses": torch.zeros(2, 3, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        "response_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "token_level_scores": torch.tensor([[0.0, 0.0, 3.0], [0.0, 1.0, 0.0]]),
        "old_log_probs": torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 5.0]]),
        "ref_log_prob": torch.tensor([[-1.5, -2.0, -2.0], [-3.0, -1.0, -9.0]]),
    } | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    non_tensors = {} if uid is None else {"uid": np.array(uid, object)}
    return DataProto.from_dict(tensors=tensors, non_tensors=non_tensors)


def test_a_penalty_is_taken_from_the_scores():
    """log p - log p_ref per token is 0.5, 0, -1 and 2, 0; the mean of the samples' means is (-1/6 + 1) / 2."""
    data, controller = batch(), AdaptiveKLController(0.1, target_kl=1.0, horizon=100)
    result, metrics = apply_kl_penalty(data, kl_ctrl=controller, kl_penalty="kl")
    assert result is data
    torch.testing.assert_close(
        data.batch["token_level_rewards"], torch.tensor([[-0.05, 0.0, 3.1], [-0.2, 1.0, 0.0]]), atol=1e-6, rtol=0
    )
    mean = (-1 / 6 + 1) / 2
    assert metrics == pytest.approx({"actor/reward_kl_penalty": mean, "actor/reward_kl_penalty_coeff": 0.1})
    # arXiv:1909.08593: the relative error is clipped at -0.2; the batch has 2 of the horizon's 100 samples.
    assert controller.value == pytest.approx(0.1 * (1 - 0.2 * 2 / 100))


def test_a_penalty_may_have_another_estimator_and_replaces_earlier_rewards():
    data = batch(token_level_rewards=torch.full((2, 3), 7.0))
    data, _ = apply_kl_penalty(data, FixedKLController(1.0), "abs")
    expected = torch.tensor([[-0.5, 0.0, 2.0], [-2.0, 1.0, 0.0]])
    torch.testing.assert_close(data.batch["token_level_rewards"], expected, atol=1e-6, rtol=0)


def test_a_run_without_a_penalty_is_rewarded_with_the_scores():
    controller = FixedKLController(0.5)
    data, metrics = compute_rewards(batch(), AlgorithmConfig(), controller)
    assert torch.equal(data.batch["token_level_rewards"], data.batch["token_level_scores"]) and metrics == {}
    with_penalty = AlgorithmConfig(use_kl_in_reward=True, kl_penalty="abs")
    data, metrics = compute_rewards(batch(), with_penalty, controller)
    assert data.batch["token_level_rewards"][0].tolist() == pytest.approx([-0.25, 0.0, 2.5])
    assert metrics["actor/reward_kl_penalty_coeff"] == 0.5


REWARDS = {"token_level_rewards": torch.tensor([[0.0, 0.0, 3.0], [0.0, 1.0, 0.0]])}


@pytest.mark.parametrize("name", ["grpo", AdvantageEstimator.GRPO])
def test_grpo_normalizes_by_the_spread_of_the_group_unless_told_otherwise(name):
    data = compute_advantage(batch(**REWARDS), adv_estimator=name)
    deviation = math.sqrt(2.0)  # of 3 and 1, unbiased
    expected = torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 0.0]])
    torch.testing.assert_close(data.batch["advantages"], expected / deviation, atol=1e-5, rtol=0)
    # As in upstream verl, the argument decides, whatever the config says.
    config = AlgorithmConfig(norm_adv_by_std_in_grpo=True)
    data = compute_advantage(batch(**REWARDS), name, norm_adv_by_std_in_grpo=False, num_repeat=2, config=config)
    torch.testing.assert_close(data.batch["advantages"], expected, atol=1e-6, rtol=0)
    assert torch.equal(data.batch["returns"], data.batch["advantages"])


def test_gae_takes_gamma_and_lambda_from_the_arguments_and_needs_no_groups():
    values = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    data = compute_advantage(
        batch(uid=None, **REWARDS, values=values), "gae", gamma=0.5, lam=0.5, config=AlgorithmConfig(gamma=0.9)
    )
    # delta_t = r_t + 0.5 V_{t+1} - V_t, A_t = delta_t + 0.25 A_{t+1}, the return is A_t + V_t.
    last = 3.0 - 1.0
    middle = 0.5 * 1.0 - 2.0 + 0.25 * last
    first = 0.5 * 2.0 - 1.0 + 0.25 * middle
    assert data.batch["returns"][0].tolist() == pytest.approx([first + 1.0, middle + 2.0, last + 1.0])
    assert data.batch["returns"][1, :2].tolist() == pytest.approx([0.25, 1.0])


def test_another_estimator_reads_the_config():
    @register_adv_est("gamma_of_the_config")
    def gamma_of_the_config(token_level_rewards, response_mask, index, config=None):
        return token_level_rewards * config.gamma, token_level_rewards

    data = compute_advantage(batch(**REWARDS), "gamma_of_the_config", config=AlgorithmConfig(gamma=0.25))
    assert data.batch["advantages"][0].tolist() == [0.0, 0.0, 0.75]
    with pytest.raises(ValueError, match=r"needs the column index, .*: the column uid gives the group of each sample"):
        compute_advantage(batch(uid=None, **REWARDS), "gamma_of_the_config")


def test_all_response_tokens_count_without_a_mask_of_the_model():
    data = compute_advantage(batch(**REWARDS, response_mask=None), "grpo")
    assert data.batch["response_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert data.batch["advantages"][1].tolist()[2] == 0.0
