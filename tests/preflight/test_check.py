import pytest

TOOL_AGENT = {
    "actor_rollout_ref__rollout__agent__default_agent_loop": "tool_agent",
    "actor_rollout_ref__rollout__multi_turn__enable": True,
}
KEYS = [
    ("data.train_files", ".parquet", {}),
    ("data.custom_cls.path", ".py", {"data__custom_cls__name": "Mine"}),
    ("actor_rollout_ref.model.path", "", {}),
    ("actor_rollout_ref.model.tokenizer_path", "", {}),
    ("actor_rollout_ref.model.lora_adapter_path", "", {}),
    ("actor_rollout_ref.rollout.multi_turn.tool_config_path", ".yaml", TOOL_AGENT),
    ("actor_rollout_ref.rollout.agent.agent_loop_config_path", ".yaml", {}),
    (
        "actor_rollout_ref.rollout.quantization_config_file",
        ".json",
        {"actor_rollout_ref__rollout__quantization": "ascend"},
    ),
    ("critic.model.path", "", {"critic__enable": True}),
    ("reward.custom_reward_function.path", ".py", {}),
    ("trainer.default_local_dir", "", {}),
    ("trainer.resume_from_path", "", {"trainer__resume_mode": "resume_path"}),
]


@pytest.mark.parametrize(("key", "suffix", "changes"), KEYS, ids=[key for key, *_ in KEYS])
@pytest.mark.parametrize("path", ["/tmp/" + "x" * 300, "/tmp" + "/xxx" * 1500])
def test_a_path_that_is_too_long_is_an_error_of_its_key(problem_of, key, suffix, changes, path):
    assert problem_of(**changes, **{key.replace(".", "__"): path + suffix}).startswith(key)
