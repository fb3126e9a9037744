"""Which kinds of user code a config contains."""

import pytest

from verl.trainer.probes.kinds import user_code

AGENT = "actor_rollout_ref.rollout"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        ({}, ()),
        ({"reward.custom_reward_function.path": "a.py"}, ("reward",)),
        ({"reward.custom_reward_function.path": "a.py", "reward.reward_manager.name": "dapo"}, ("reward",)),
        ({"reward.custom_reward_function.path": "a.py", "reward.reward_manager.name": "mine"}, ("reward_manager",)),
        ({"algorithm.adv_estimator": "mine"}, ("algorithms",)),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "mine"}, ("algorithms",)),
        ({"actor_rollout_ref.actor.policy_loss.loss_mode": "gspo", "algorithm.adv_estimator": "rloo"}, ()),
        ({"data.custom_cls.path": "a.py", "reward.custom_reward_function.path": "a.py"}, ("dataset", "reward")),
        ({f"{AGENT}.agent.default_agent_loop": "mine"}, ("agent",)),
        ({f"{AGENT}.agent.agent_loop_config_path": "a.yaml"}, ("agent",)),
        ({f"{AGENT}.multi_turn.tool_config_path": "a.yaml"}, ("agent",)),
        ({f"{AGENT}.multi_turn.function_tool_path": "a.py"}, ("agent",)),
        ({f"{AGENT}.agent.default_agent_loop": "tool_agent"}, ()),
    ],
)
def test_kinds_of_a_config(run, keys, kinds):
    run.keys |= keys
    assert user_code(run.config(), starting=False) == kinds
    assert user_code(run.config(), starting=True) == tuple(kind for kind in kinds if kind != "agent")
