"""What an estimator is called with."""

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


def test_it_gets_what_it_names():
    def estimator(response_mask, values, *, index, non_tensor_batch, unknown=3):
        raise NotImplementedError

    given = arguments(estimator)
    assert given["values"] is TENSORS["values"]
    assert given["response_mask"] is TENSORS["response_mask"]
    assert given["index"] is INDEX
    assert given["non_tensor_batch"] is NON_TENSORS
    assert set(given) == {"values", "response_mask", "index", "non_tensor_batch"}


def test_kwargs_gets_the_core_and_no_other_column():
    def estimator(**columns):
        raise NotImplementedError

    assert set(arguments(estimator)) == {"token_level_rewards", "response_mask", "index", "config"}
    assert arguments(estimator)["config"] is CONFIG


def test_a_column_with_a_default_is_given_where_there_is_one():
    def estimator(token_level_rewards, values=None, ref_log_prob=None):
        raise NotImplementedError

    assert set(arguments(estimator)) == {"token_level_rewards", "values"}


def test_a_column_that_is_not_there():
    @register_adv_est("test_registry_needs_more")
    def estimator(token_level_rewards, reward_baselines):
        raise NotImplementedError

    with pytest.raises(ValueError, match="test_registry_needs_more asks for the column reward_baselines") as error:
        arguments(estimator)
    columns = "config, index, non_tensor_batch, response_mask, token_level_rewards, values"
    assert f"name one of {columns}, or give reward_baselines a default" in str(error.value)


def test_a_column_of_objects_is_found_elsewhere():
    def estimator(acc):
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"estimator asks for the column acc.*parameter non_tensor_batch"):
        arguments(estimator)


def test_a_core_column_that_is_not_there():
    def estimator(**columns):
        raise NotImplementedError

    with pytest.raises(ValueError, match="asks for the column token_level_rewards"):
        estimator_arguments(estimator, {}, {}, INDEX, CONFIG)


@pytest.mark.parametrize(
    ("column", "estimators"),
    [
        ("values", names.CRITIC_ESTIMATORS),
        ("reward_baselines", ("remax",)),
        ("sum_pi_squared", names.SUM_PI_SQUARED_ESTIMATORS),
    ],
)
def test_the_names_say_which_estimators_need_a_column(column, estimators):
    need = {name for name in names.ADV_ESTIMATORS if column in required_columns(get_adv_estimator_fn(name))}
    assert need == set(estimators)


def test_required_columns():
    assert required_columns(get_adv_estimator_fn("grpo")) == ()
    assert required_columns(get_adv_estimator_fn("gdpo")) == ()
    assert required_columns(get_adv_estimator_fn("optimal_token_baseline")) == ("old_log_probs", "sum_pi_squared")
