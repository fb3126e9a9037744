"""The columns that an estimator requires, compared with those of the run."""

import pytest

from verl.config import PPOConfig
from verl.config.rollout_correction import resolve
from verl.trainer.ppo import estimator_columns
from verl.workers.reward.loop import RESERVED_NAMES


def test_the_names_of_columns_are_reserved():
    assert set(estimator_columns.COMMON_COLUMNS) <= RESERVED_NAMES


def estimator(token_level_rewards, response_mask, values, entropys, **kwargs):
    return token_level_rewards, token_level_rewards


@pytest.fixture
def columns(monkeypatch):
    """Return a function that computes the required columns of `estimator` for a run."""
    monkeypatch.setattr(estimator_columns, "get_adv_estimator_fn", lambda name: estimator)

    def compute(*, critic, bypass=False, reuse=False):
        config = PPOConfig()
        config.critic.enable = critic
        config.algorithm.rollout_correction.bypass_mode = bypass
        config.actor_rollout_ref.actor.old_log_probs_from_rollout.enable = reuse
        return estimator_columns.estimator_columns(config, resolve(config.algorithm.rollout_correction))

    return compute


def test_the_required_columns_are_returned(columns):
    assert set(columns(critic=True)) == {"values", "entropys"}


def test_values_without_a_critic_are_rejected(columns):
    with pytest.raises(ValueError, match=r"requires the columns values, .*set critic\.enable=True for values"):
        columns(critic=False)


def test_entropies_in_bypass_mode_are_rejected(columns):
    with pytest.raises(ValueError, match="requires the columns entropys, but this run has only"):
        columns(critic=True, bypass=True)


def test_entropies_with_log_probs_of_the_rollout_are_rejected(columns):
    with pytest.raises(ValueError, match=r"columns entropys, .*set .*old_log_probs_from_rollout\.enable=False"):
        columns(critic=True, reuse=True)
