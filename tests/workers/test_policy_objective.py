"""The actor's objective: sum of its parts, and the arguments of a policy loss."""

import functools

import numpy as np
import pytest
import torch

from fixtures.engine_cases import actor_config, make_batch
from fixtures.ranks import run_ranks
from verl.algorithms.losses.common import LossConfig
from verl.trainer.ppo.core_algos import agg_loss, compute_policy_loss_vanilla, kl_penalty, register_policy_loss
from verl.workers.engine.metric_sums import MetricSums
from verl.workers.policy_objective import PolicyObjective


@pytest.fixture
def case():
    data = make_batch(8)
    mask = data.batch["response_mask"]
    info = {
        "batch_num_tokens": int(mask.sum()) * 2,
        "global_batch_size": 14,
        "loss_scale_factor": 7,
        "temperature": 1.0,
    }
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(mask.shape, generator=generator) - 3
    entropy = torch.rand(mask.shape, generator=generator)
    return log_probs, entropy, dict(data.batch.items()), info


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum-norm"])
def test_the_loss_is_the_sum_of_its_parts(case, mode):
    log_probs, entropy, columns, info = case
    mask = columns["response_mask"]
    actor = actor_config(loss_agg_mode=mode, entropy_coeff=0.3, kl_loss_coef=0.2, kl_loss_type="mse")
    loss, metrics = PolicyObjective(compute_policy_loss_vanilla, actor, info)(log_probs, entropy, columns)
    denominators = {k: info[k] for k in ("batch_num_tokens", "global_batch_size", "loss_scale_factor")}
    kl = agg_loss(kl_penalty(log_probs, columns["ref_log_prob"], "mse"), mask, mode, **denominators)
    bonus = agg_loss(entropy, mask, mode, **denominators)
    expected = metrics["actor/pg_loss"] - 0.3 * bonus + 0.2 * kl
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["actor/kl_loss"], kl)
    torch.testing.assert_close(metrics["actor/entropy"], agg_loss(entropy, mask, "token-mean", **denominators))
    by_mode = agg_loss(entropy, mask, actor.loss_agg_mode, **denominators)
    torch.testing.assert_close(metrics["actor/entropy_loss"], by_mode)


def test_arguments_of_a_registered_policy_loss(case):
    log_probs, entropy, columns, info = case
    columns = {**columns, "rollout_is_weights": torch.ones_like(log_probs)}
    seen = {}

    def custom(**arguments):
        seen.update(arguments)
        value = agg_loss(arguments["log_prob"], arguments["response_mask"], "token-sum")
        return value, {"actor/custom": value}

    actor = actor_config(use_kl_loss=False, entropy_coeff=0.0)
    loss, metrics = PolicyObjective(custom, actor, info)(log_probs, entropy, columns)
    assert set(seen) == {
        "old_log_prob",
        "log_prob",
        "advantages",
        "response_mask",
        "loss_agg_mode",
        "config",
        "rollout_is_weights",
    }
    assert seen["config"].clip_ratio_high == 0.28
    assert seen["config"].get("clip_ratio", None) == actor.clip_ratio and "absent" not in seen["config"]
    assert seen["config"]["global_batch_info"] is seen["config"].global_batch_info
    assert isinstance(seen["config"], LossConfig) and "global_batch_info" not in actor
    assert {name: seen["config"][name] for name in actor} == dict(actor)
    assert seen["config"].global_batch_info == {"dp_size": 1} | {k: info[k] for k in info if k != "temperature"}
    assert loss == metrics["actor/custom"] == metrics["actor/pg_loss"]


def test_only_a_loss_with_a_token_selector_gets_selected_tokens(case):
    log_probs, entropy, columns, info = case
    columns = {**columns, "selected_tokens": torch.ones_like(columns["response_mask"])}
    seen = []

    def loss(**arguments):
        seen.append(arguments.get("selected_tokens"))
        return agg_loss(arguments["log_prob"], arguments["response_mask"], "token-sum"), {}

    @register_policy_loss("test_policy_objective_selects", select_tokens=lambda **columns: columns)
    def selecting(**arguments):
        return loss(**arguments)

    for function in (loss, selecting):
        PolicyObjective(function, actor_config(use_kl_loss=False), info)(log_probs, entropy, columns)
    assert seen[0] is None and seen[1] is columns["selected_tokens"]


@pytest.mark.parametrize("parts", [[range(8)], [range(1), range(1, 4), range(4, 8)], [range(5), range(0), range(5, 8)]])
def test_numbers_are_means_over_the_tokens_and_tensors_are_sums(case, parts):
    log_probs, entropy, columns, info = case
    mask = columns["response_mask"].bool()
    info = {**info, "batch_num_tokens": int(mask.sum())}

    def loss(**arguments):
        tokens = arguments["log_prob"][arguments["response_mask"].bool()]
        share = agg_loss(arguments["log_prob"], arguments["response_mask"], "token-mean", **denominators)
        # The mean of no tokens is NaN.
        return share, {"number": tokens.mean().item(), "one": 1, "flag": True, "numpy": np.float32(2), "tensor": share}

    denominators = {k: info[k] for k in ("batch_num_tokens", "global_batch_size", "loss_scale_factor")}
    objective = PolicyObjective(loss, actor_config(use_kl_loss=False, entropy_coeff=0.0), info)
    sums = MetricSums()
    for part in parts:
        rows = list(part)
        _, metrics = objective(log_probs[rows], entropy[rows], {name: value[rows] for name, value in columns.items()})
        for name, value in metrics.items():
            sums.add(name, value)
    mean = float(log_probs[mask].mean())
    expected = {"number": mean, "tensor": mean, "actor/pg_loss": mean, "one": 1.0, "flag": 1.0, "numpy": 2.0}
    [found] = run_ranks(1, lambda rank: sums.reduce(None, torch.device("cpu")))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_number_that_only_some_micro_batches_have_is_the_mean_over_those(case):
    log_probs, entropy, columns, info = case
    mask = columns["response_mask"].bool()

    def loss(**arguments):
        tokens = arguments["log_prob"][arguments["response_mask"].bool()]
        metrics = {"some": tokens.mean().item()} if (arguments["sample_index"] < 5).any() else {}
        return arguments["log_prob"].sum(), metrics

    rows = [[0, 3], [4], [5, 6, 7]]
    sums = MetricSums()
    for part in rows:
        given = {name: value[part] for name, value in columns.items()}
        selecting = functools.partial(loss, sample_index=torch.tensor(part))
        _, metrics = PolicyObjective(selecting, actor_config(use_kl_loss=False, entropy_coeff=0.0), info)(
            log_probs[part], entropy[part], given
        )
        for name, value in metrics.items():
            sums.add(name, value)
    [found] = run_ranks(1, lambda rank: sums.reduce(None, torch.device("cpu")))
    first = [0, 3, 4]
    assert found["some"] == pytest.approx(float(log_probs[first][mask[first]].mean()), rel=1e-5)


@pytest.mark.parametrize("value", ["text", [1.0], torch.ones(2)])
def test_a_metric_that_is_no_number_is_rejected_by_name(case, value):
    log_probs, entropy, columns, info = case

    def loss(**arguments):
        return agg_loss(arguments["log_prob"], arguments["response_mask"], "token-sum"), {"actor/mine": value}

    with pytest.raises(ValueError, match="loss_mode=vanilla returned the metric actor/mine as"):
        PolicyObjective(loss, actor_config(use_kl_loss=False), info)(log_probs, entropy, columns)


@pytest.mark.parametrize("name", ["loss", "tokens", "actor/entropy"])
def test_a_metric_with_a_name_of_the_actor_is_rejected(case, name):
    log_probs, entropy, columns, info = case

    def loss(**arguments):
        return agg_loss(arguments["log_prob"], arguments["response_mask"], "token-sum"), {name: 1.0}

    with pytest.raises(ValueError, match=rf"loss_mode=vanilla returned the metrics \['{name}'\]"):
        PolicyObjective(loss, actor_config(use_kl_loss=False), info)(log_probs, entropy, columns)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda loss: loss, "returned Tensor; return a tuple (loss, metrics)"),
        (lambda loss: (loss, 0.0, 0.0, 0.0), "returned 4 values"),
        (lambda loss: (loss, torch.zeros(())), "returned 2 values"),
        (lambda loss: (loss.item(), {}), "returned the loss as float"),
        (lambda loss: (loss * torch.ones(3), {}), "returned the loss as [3]; return a scalar tensor"),
    ],
)
def test_a_wrong_result_of_a_policy_loss_is_rejected_by_name(case, result, words):
    log_probs, entropy, columns, info = case

    def loss(**arguments):
        return result(agg_loss(arguments["log_prob"], arguments["response_mask"], "token-sum"))

    objective = PolicyObjective(loss, actor_config(use_kl_loss=False), info)
    with pytest.raises(ValueError) as raised:
        objective(log_probs, entropy, columns)
    assert str(raised.value).startswith("actor_rollout_ref.actor.policy_loss.loss_mode=vanilla ")
    assert words in str(raised.value)
