"""The probe of advantage estimators and policy losses: a step on a made-up batch."""

import pytest

from verl.trainer.ppo.core_algos import agg_loss, register_adv_est, register_policy_loss
from verl.workers.reward.loop import RewardResult

ESTIMATOR, LOSS = "algorithm.adv_estimator", "actor_rollout_ref.actor.policy_loss.loss_mode"


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    from verl.algorithms.advantages.common import ADV_ESTIMATORS
    from verl.algorithms.losses.common import POLICY_LOSSES

    for registry in (ADV_ESTIMATORS, POLICY_LOSSES):
        monkeypatch.setattr(registry, "_functions", dict(registry._functions))


def spread(values, mask):
    return values[:, None] * mask


def by_name(token_level_rewards, response_mask, index, config):
    assert token_level_rewards.shape == response_mask.shape and len(index) == 3 * 4 and config.gamma == 1.0
    assert sorted({tuple(index).count(group) for group in index}) == [4]
    advantages = spread(token_level_rewards.sum(-1), response_mask)
    return advantages, advantages


def with_passes(token_level_rewards, response_mask, old_log_probs, entropys, sum_pi_squared, reward_baselines):
    assert reward_baselines.shape == (12,) and bool((old_log_probs[response_mask == 0] == 0).all())
    return entropys * sum_pi_squared, entropys


def with_extra(response_mask, non_tensor_batch):
    values = response_mask * float(sum(non_tensor_batch["acc"]))
    return values, values


@pytest.mark.parametrize("function", [by_name, with_passes, with_extra])
def test_a_right_estimator_has_no_finding(run, function):
    register_adv_est("mine")(function)
    run.keys[ESTIMATOR] = "mine"
    context = run.context()
    context.rewards = [RewardResult(1.0, {"acc": 1.0}, None, 0.0)]
    from verl.trainer.probes.algorithms import probe

    probe(context)
    assert context.connection.problems == []


def normalized(token_level_rewards, response_mask, index):
    rewards = token_level_rewards.sum(-1).view(-1, 4)
    advantages = spread(((rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, keepdim=True)).flatten(), 1)
    return advantages * response_mask, advantages * response_mask


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda token_level_rewards, response_mask: response_mask, "returned a Tensor; return a tuple"),
        (lambda token_level_rewards, response_mask: (token_level_rewards.sum(-1),) * 2, "of shape [12]; return"),
        (normalized, "returned advantages with NaN or infinite values"),
        (lambda token_level_rewards, mask: (mask, mask), "requires the columns mask"),
        (lambda values: (values, values), "requires the columns values"),
        (lambda token_level_rewards: (token_level_rewards @ token_level_rewards,) * 2, "RuntimeError: mat1 and mat2"),
        (lambda response_mask: (response_mask / undefined,) * 2, "NameError: name 'undefined' is not defined"),  # noqa: F821
    ],
)
def test_a_wrong_estimator_is_an_error(run, function, words):
    register_adv_est("mine")(function)
    run.keys[ESTIMATOR] = "mine"
    found = run.probe("algorithms", device="npu")
    assert [name for name, _ in found.problems] == ["error"], found.problems
    assert f"{ESTIMATOR}=mine" in found.of("error")[0] and words in found.of("error")[0]


def test_values_of_rewards_that_are_not_known_are_a_warning(run):
    register_adv_est("mine")(with_extra)
    run.keys[ESTIMATOR] = "mine"
    found = run.probe("algorithms")
    assert found.of("error") == [] and "KeyError: 'acc'" in found.of("warning")[0]


def right(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights=None):
    ratio = (log_prob - old_log_prob).exp()
    loss = agg_loss(-advantages * ratio, response_mask, loss_agg_mode, **config.global_batch_info)
    return loss, {"actor/mine": 0.5}


@pytest.mark.parametrize(
    "keys",
    [
        {"trainer.n_gpus_per_node": 1},
        {"trainer.n_gpus_per_node": 8},
        # The built-in estimator is not called: it would need values of the reward.
        {"algorithm.adv_estimator": "gdpo", "algorithm.gdpo_reward_keys": "[a,b]"},
        {"algorithm.rollout_correction.preset": "decoupled_token_is"},
    ],
)
def test_a_right_loss_has_no_finding(run, keys):
    weights = []

    def loss(**arguments):
        weights.append(arguments["rollout_is_weights"])
        return right(**arguments)

    register_policy_loss("mine")(loss)
    run.keys |= {LOSS: "mine", **keys}
    assert run.probe("algorithms").problems == []
    assert (weights[0] is not None) is ("algorithm.rollout_correction.preset" in keys)


def test_selected_tokens_are_passed(run):
    def half(log_prob, old_log_prob, advantages, response_mask, config, seed):
        return log_prob > log_prob.median()

    def loss(selected_tokens, **arguments):
        assert selected_tokens.shape == arguments["log_prob"].shape
        return right(**arguments)

    register_policy_loss("mine", select_tokens=half)(loss)
    register_policy_loss("flat", select_tokens=lambda log_prob, **_: log_prob[0] > 0)(lambda **_: right(**_))
    run.keys[LOSS] = "mine"
    assert run.probe("algorithms").problems == []
    run.keys[LOSS] = "flat"
    (text,) = run.probe("algorithms").of("error")
    assert "select_tokens returned [" in text and "return a bool tensor [B, T]" in text


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda log_prob, old_log_prob, advantages, response_mask: log_prob.sum(), "TypeError: "),
        (lambda **a: right(**a)[0], "returned Tensor; return a tuple (loss, metrics)"),
        (lambda **a: (*right(**a), 0.0, 0.0), "returned 4 values"),
        (lambda **a: (-a["advantages"] * a["log_prob"], {}), "returned the loss as ["),
        (lambda **a: (right(**a)[0] / 0, {}), "; a loss must be finite"),
        (lambda **a: ((a["log_prob"] * 0).sqrt().sum(), {}), "gradient is NaN or infinite"),
        (lambda **a: (right(**a)[0], {"mine": a["log_prob"]}), "returned the metric mine as Tensor"),
        (lambda **a: (right(**a)[0], {"mine": float("nan")}), "the metric mine=nan"),
        (lambda **a: (right(**a)[0] + a["config"].clip_rate, {}), "AttributeError: "),
    ],
)
def test_a_wrong_loss_is_an_error(run, function, words):
    register_policy_loss("mine")(function)
    run.keys |= {LOSS: "mine", "trainer.n_gpus_per_node": 1}
    found = run.probe("algorithms")
    assert [name for name, _ in found.problems] == ["error"], found.problems
    assert f"{LOSS}=mine" in found.of("error")[0] and words in found.of("error")[0]


@pytest.mark.parametrize("use_kl_loss", [False, True])
def test_a_loss_without_gradient_is_a_warning(run, use_kl_loss):
    register_policy_loss("mine")(lambda **a: (right(**a)[0].detach(), {}))
    run.keys |= {LOSS: "mine", "trainer.n_gpus_per_node": 1, "actor_rollout_ref.actor.use_kl_loss": use_kl_loss}
    found = run.probe("algorithms")
    assert found.of("error") == [] and "gradient is 0 for every token" in found.of("warning")[0]


def test_a_loss_that_needs_the_device_of_the_run_is_a_warning(run):
    def needs_a_device(**arguments):
        raise RuntimeError("only for NPUs")

    register_policy_loss("mine")(needs_a_device)
    run.keys[LOSS] = "mine"
    assert "only for NPUs" in run.probe("algorithms", device="npu").of("warning")[0]
    assert "only for NPUs" in run.probe("algorithms", device="cpu").of("error")[0]


@pytest.mark.slow
def test_a_loss_that_fails_without_tokens_is_a_warning_with_several_ranks(run):
    def mean(log_prob, advantages, response_mask, **_):
        return -(advantages * log_prob)[response_mask.bool()].mean(), {}

    register_policy_loss("mine")(mean)
    run.keys |= {LOSS: "mine", "trainer.n_gpus_per_node": 1}
    assert run.probe("algorithms").problems == []
    run.keys["trainer.n_gpus_per_node"] = 8
    found = run.probe("algorithms")
    assert found.of("error") == [] and "calls the loss without a token" in found.of("warning")[0]
