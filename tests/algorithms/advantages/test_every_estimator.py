"""Properties of all estimators, which are called as the trainer calls them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import estimator_arguments, get_adv_estimator_fn
from verl.config import names

every_estimator = pytest.mark.parametrize("name", names.ADV_ESTIMATORS)


def run(name, batch, config):
    function = get_adv_estimator_fn(name)
    return function(**estimator_arguments(function, batch.tensors, batch.non_tensors, batch.index, config))


def altered(batch, change):
    """The batch with `change` applied to every column."""
    return SimpleNamespace(
        tensors={name: change(column) for name, column in batch.tensors.items()},
        non_tensors={name: change(column) for name, column in batch.non_tensors.items()},
        index=change(batch.index),
    )


@every_estimator
def test_result_is_finite_float32_and_0_outside_the_mask(batch, config, name):
    for result in run(name, batch, config):
        assert result.dtype == torch.float32 and result.shape == batch.response_mask.shape
        assert result.is_contiguous()
        assert torch.isfinite(result).all()
        assert not result[~batch.response_mask.bool()].any()
        assert result[batch.response_mask.bool()].any()


@every_estimator
def test_result_does_not_depend_on_the_order_of_the_samples(batch, config, name):
    order = np.random.default_rng(3).permutation(len(batch.index))
    permuted = run(name, altered(batch, lambda column: column[order]), config)
    for result, expected in zip(permuted, run(name, batch, config), strict=True):
        torch.testing.assert_close(result, expected[order], rtol=1e-6, atol=1e-7)


@every_estimator
def test_result_does_not_depend_on_the_padding(batch, config, name):
    def padded(column):
        if isinstance(column, np.ndarray) or column.ndim == 1:
            return column
        filler = torch.zeros if column is batch.token_level_rewards or column is batch.response_mask else torch.rand
        return torch.cat([column, filler(len(column), 5).to(column.dtype)], dim=1)

    wide = run(name, altered(batch, padded), config)
    for result, expected in zip(wide, run(name, batch, config), strict=True):
        torch.testing.assert_close(result[:, :8], expected, rtol=1e-6, atol=1e-7)
        assert not result[:, 8:].any()


@every_estimator
def test_inputs_are_not_modified(batch, config, name):
    before = {key: column.clone() for key, column in batch.tensors.items()}
    run(name, batch, config)
    for key, column in batch.tensors.items():
        torch.testing.assert_close(column, before[key], rtol=0, atol=0, equal_nan=True)


@every_estimator
@pytest.mark.parametrize("tokens", [0, 1])
def test_batch_of_one_sample_with_at_most_one_token(batch, config, name, tokens):
    one = altered(batch, lambda column: column[:1])
    one.tensors["response_mask"] = torch.zeros(1, 8, dtype=torch.int64)
    one.tensors["response_mask"][0, :tokens] = 1
    for result in run(name, one, config):
        assert torch.isfinite(result).all()
        assert not result[:, tokens:].any()


@pytest.mark.parametrize("name", names.GROUP_ESTIMATORS)
def test_equal_rewards_in_a_group_give_no_advantage(batch, config, name):
    same = altered(batch, lambda column: column)
    same.index = np.array(["a"] * 15)
    same.tensors["response_mask"] = torch.ones(15, 8)
    rewards = torch.zeros(15, 8)
    rewards[:, 7] = 0.1
    same.tensors["token_level_rewards"] = rewards
    for key in ("old_log_probs", "sum_pi_squared", "rollout_is_weights"):
        same.tensors[key] = torch.rand(15, 8, generator=torch.Generator().manual_seed(1))
    same.tensors["old_log_probs"] -= 2
    same.non_tensors = {key: np.array([0.1] * 15, dtype=object) for key in batch.non_tensors}
    assert run(name, same, config)[0].abs().max() < 1e-6


@every_estimator
def test_config_names_list_the_estimators_that_use_groups(batch, config, name):
    regrouped = altered(batch, lambda column: column)
    regrouped.index = np.roll(batch.index, 1)
    same = torch.equal(run(name, batch, config)[0], run(name, regrouped, config)[0])
    assert same is (name not in names.GROUP_ESTIMATORS)
