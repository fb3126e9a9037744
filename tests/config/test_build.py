"""Values as YAML gives them, as the dataclasses hold them."""

from verl.config import PPOConfig
from verl.config.build import build


def test_a_choice_that_yaml_takes_for_a_truth_value_stays_a_choice():
    values = {"actor_rollout_ref": {"rollout": {"checkpoint_engine": {"delta": False}}}}
    assert build(PPOConfig, values).actor_rollout_ref.rollout.checkpoint_engine.delta == "off"
    flags = {"actor_rollout_ref": {"rollout": {"calculate_log_probs": False}}}
    assert build(PPOConfig, flags).actor_rollout_ref.rollout.calculate_log_probs is False
