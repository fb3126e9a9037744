import pytest

from fixtures.run_files import with_overrides
from verl.config import PPOConfig
from verl.config.schema import walk
from verl.preflight.check import examine
from verl.preflight.target import Target

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


def examined(run_files, **changes):
    """The plan and the findings of the valid config with changes; one error is that prompts cannot be measured."""
    return examine(with_overrides(run_files.overrides(**changes)), Target(starting=False))


CORRECTION = [name for name, _, _ in walk(PPOConfig()) if name.startswith("algorithm.rollout_correction.")]


@pytest.mark.parametrize("name", CORRECTION)
def test_an_invalid_rollout_correction_hides_no_other_finding(run_files, name):
    wrong = "True" if name.endswith(("mode", "debug_rollout_actor_probs", "normalize")) else "nowhere"
    other = {"trainer__logger": "[nowhere]", "trainer__total_training_steps": 3, "trainer__total_epochs": 2}
    found = examined(run_files, **{name.replace(".", "__"): wrong}, **other)[1]
    assert any(error.startswith("trainer.logger") for error in found.errors)
    assert any("trainer.total_epochs" in note for note in found.notes)
    if wrong == "nowhere":
        assert any(error.startswith(name) for error in found.errors)


MINI, MICRO = "actor_rollout_ref__actor__ppo_mini_batch_size", "actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu"
TENSOR_PARALLEL = "actor_rollout_ref__rollout__tensor_model_parallel_size"


@pytest.mark.parametrize(
    "changes",
    [
        {MINI: 16},
        {MINI: 3},
        {MICRO: 3},
        {MICRO: None},
        {"data__train_batch_size": 48, MINI: 48},
        {"data__train_max_samples": 0},
        {TENSOR_PARALLEL: 2},
    ],
)
def test_sizes_that_do_not_fit_together_give_no_plan(run_files, changes):
    plan, found = examined(run_files, **changes)
    assert plan is None and len(found.errors) == 2
    assert any("on a CPU" in note for note in found.notes)


def test_an_error_without_influence_on_the_numbers_leaves_the_plan(run_files):
    plan, found = examined(run_files, actor_rollout_ref__actor__policy_loss__loss_mode="dro")
    assert plan is not None and plan.optimizer_steps_per_step == 2 and len(found.errors) == 2
