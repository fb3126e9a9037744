"""Which models a run has, under upstream verl's names."""

import pytest

from verl.config import load_config
from verl.trainer.ppo.utils import need_critic, need_reference_policy


@pytest.mark.parametrize(
    ("overrides", "critic", "reference"),
    [
        (["algorithm.adv_estimator=gae"], True, False),
        (["algorithm.adv_estimator=grpo"], False, False),
        (["algorithm.adv_estimator=grpo", "critic.enable=True"], True, False),
        (["algorithm.adv_estimator=gae", "critic.enable=False"], False, False),
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=True"], False, True),
        (["algorithm.adv_estimator=rloo", "algorithm.use_kl_in_reward=True"], False, True),
    ],
)
def test_models_of_a_run(overrides, critic, reference):
    config = load_config(overrides)
    assert (need_critic(config), need_reference_policy(config)) == (critic, reference)
