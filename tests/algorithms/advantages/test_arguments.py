"""The arguments of an estimator."""

import numpy as np
import pytest
import torch

from verl.algorithms.advantages import estimator_arguments, get_adv_estimator_fn, register_adv_est, required_columns
from verl.config import names

TENSORS = {name: torch.full((2, 3), i) for i, name in enumerate(("token_level_rewards", "response_mask", "values"))}
NON_TENSORS = {"acc": np.array([0.0, 1.0], dtype=object)}
INDEX = np.array(["a", "b"], dtype=object)
CONFIG = object()


def arguments(function):
    return estimator_arguments(function, TENSORS, NON_TENSORS, INDEX, CONFIG)


def test_estimator_gets_the_columns_that_its_parameters_name():
    def estimator(response_mask, values, *, index, non_tensor_batch, unknown=3):
        raise NotImplementedError

    given = arguments(estimator)
    assert given["values"] is TENSORS["values"]
    assert given["response_mask"] is TENSORS["response_mask"]
    assert given["index"] is INDEX
    assert given["non_tensor_batch"] is NON_TENSORS
    assert set(given) == {"values", "response_mask", "index", "non_tensor_batch"}


def test_estimator_with_kwargs_gets_the_four_core_arguments():
    def estimator(**columns):
        raise NotImplementedError

    assert set(arguments(estimator)) == {"token_level_rewards", "response_mask", "index", "config"}
    assert arguments(estimator)["config"] is CONFIG


def test_column_with_a_default_is_passed_if_the_batch_has_it():
    def estimator(token_level_rewards, values=None, ref_log_prob=None):
        raise NotImplementedError

    assert set(arguments(estimator)) == {"token_level_rewards", "values"}


def test_missing_column_is_an_error():
    @register_adv_est("test_arguments_needs_more")
    def estimator(token_level_rewards, reward_baselines):
        raise NotImplementedError

    with pytest.raises(ValueError, match="test_arguments_needs_more needs the column reward_baselines") as error:
        arguments(estimator)
    columns = "config, index, non_tensor_batch, response_mask, token_level_rewards, values"
    assert f"use one of {columns}, or give reward_baselines a default" in str(error.value)


def test_non_tensor_column_error_points_to_non_tensor_batch():
    def estimator(acc):
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"estimator needs the column acc.*parameter non_tensor_batch"):
        arguments(estimator)


def test_missing_core_column_is_an_error():
    def estimator(**columns):
        raise NotImplementedError

    with pytest.raises(ValueError, match="needs the column token_level_rewards"):
        estimator_arguments(estimator, {}, {}, INDEX, CONFIG)


@pytest.mark.parametrize(
    ("column", "estimators"),
    [
        ("values", names.CRITIC_ESTIMATORS),
        ("reward_baselines", ("remax",)),
        ("sum_pi_squared", names.SUM_PI_SQUARED_ESTIMATORS),
    ],
)
def test_config_names_list_the_estimators_that_need_a_column(column, estimators):
    need = {name for name in names.ADV_ESTIMATORS if column in required_columns(get_adv_estimator_fn(name))}
    assert need == set(estimators)


def test_required_columns_exclude_the_core_arguments():
    assert required_columns(get_adv_estimator_fn("grpo")) == ()
    assert required_columns(get_adv_estimator_fn("gdpo")) == ()
    assert required_columns(get_adv_estimator_fn("optimal_token_baseline")) == ("old_log_probs", "sum_pi_squared")
