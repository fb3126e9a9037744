"""Checks of a reward model: one that cannot score, or that nobody asks, is refused before the start."""

import json
from pathlib import Path

import pytest

from fixtures.tiny import write_tiny_classifier, write_tiny_model

MODEL = "reward__reward_model__"
ASKS = """
async def compute_score(
    data_source, solution_str, ground_truth, extra_info, reward_router_address, reward_model_tokenizer
):
    return 0.0
"""
PLAIN = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 0.0\n"


@pytest.fixture
def enabled(tmp_path):
    return {
        "reward__custom_reward_function__path": "null",
        f"{MODEL}enable": True,
        f"{MODEL}enable_resource_pool": True,
        f"{MODEL}nnodes": 1,
        f"{MODEL}n_gpus_per_node": 2,
        f"{MODEL}rollout__tensor_model_parallel_size": 1,
        f"{MODEL}rollout__prompt_length": 64,
        f"{MODEL}rollout__response_length": 64,
        f"{MODEL}model_path": write_tiny_classifier(tmp_path / "classifier"),
    }


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def changed(folder: Path, **fields) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_the_plan_shows_the_reward_model_and_its_memory(enabled, plan_of):
    plan, without = plan_of(**enabled), plan_of()
    assert "classifier, 2 engine(s) x 1 tensor parallel; scores the responses" in plan.render()
    assert "engine(s)" not in without.render()
    assert plan.memory.other_bytes > without.memory.other_bytes + 2 * 2**30


def test_a_generative_model_is_asked_by_a_function(enabled, plan_of, tmp_path):
    judge, function = write_tiny_model(tmp_path / "judge"), written(tmp_path / "asks.py", ASKS)
    given = {**enabled, f"{MODEL}model_path": judge, "reward__custom_reward_function__path": function}
    assert "judge, 2 engine(s) x 1 tensor parallel; asked by the reward function" in plan_of(**given).render()


def test_without_a_reward_model_its_keys_have_no_effect(enabled, plan_of):
    notes = plan_of(**{f"{MODEL}model_path": enabled[f"{MODEL}model_path"], f"{MODEL}nnodes": 1}).notes
    assert any("reward_model.enable=False" in note and "nnodes" in note and "model_path" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"enable_resource_pool": False},
            ("enable_resource_pool=False", "use reward.reward_model.enable_resource_pool"),
        ),
        ({"model_path": "null"}, ("reward.reward_model.model_path is not set", "reward.reward_model.enable=False")),
        ({"model_path": "/no/such/model"}, ("model_path=/no/such/model",)),
        ({"nnodes": 0}, ("reward.reward_model.nnodes=0", "devices of its own")),
        ({"rollout__tensor_model_parallel_size": 3}, ("does not divide reward.reward_model.n_gpus_per_node=2",)),
        ({"rollout__response_length": 512}, ("response_length=512: 576 tokens", "has 512 positions")),
        ({"rollout__max_model_len": 600}, ("rollout.max_model_len=600", "has 512 positions")),
        ({"rollout__name": "sglang"}, ("reward.reward_model.rollout.name=sglang", "use vllm")),
        ({"rollout__skip_tokenizer_init": True}, ("rollout.skip_tokenizer_init=True",)),
    ],
)
def test_what_cannot_be_right_is_refused(enabled, problem_of, changes, words):
    problem = problem_of(**{**enabled, **{f"{MODEL}{name}": value for name, value in changes.items()}})
    assert all(word in problem for word in words), problem


def test_a_generative_model_without_a_function_is_refused(enabled, problem_of, tmp_path):
    problem = problem_of(**{**enabled, f"{MODEL}model_path": write_tiny_model(tmp_path / "judge")})
    assert "generates text (Qwen3ForCausalLM)" in problem and "set reward.custom_reward_function.path" in problem


def test_more_than_one_label_is_refused(enabled, problem_of, tmp_path):
    problem = problem_of(**{**enabled, f"{MODEL}model_path": write_tiny_classifier(tmp_path / "two", labels=2)})
    assert "has 2 labels" in problem


@pytest.mark.parametrize(
    ("architectures", "word"), [(["Qwen3Model"], "(Qwen3Model)"), ([], "no entry in architectures")]
)
def test_a_model_that_is_no_reward_model_is_refused(enabled, problem_of, architectures, word):
    changed(enabled[f"{MODEL}model_path"], architectures=architectures)
    problem = problem_of(**enabled)
    assert "is not a reward model" in problem and word in problem


def test_a_scoring_model_needs_a_chat_template(enabled, problem_of):
    (enabled[f"{MODEL}model_path"] / "chat_template.jinja").unlink()
    assert "has no chat template" in problem_of(**enabled)


def test_a_function_that_needs_a_reward_model_is_refused_without_one(problem_of, tmp_path):
    problem = problem_of(reward__custom_reward_function__path=written(tmp_path / "asks.py", ASKS))
    assert "requires reward_router_address, reward_model_tokenizer" in problem
    assert "set reward.reward_model.enable=True" in problem


def test_a_function_that_does_not_take_the_address_is_refused(enabled, problem_of, tmp_path):
    function = written(tmp_path / "plain.py", PLAIN)
    problem = problem_of(**{**enabled, "reward__custom_reward_function__path": function})
    assert "has no parameter reward_router_address, reward_model_tokenizer" in problem


def test_samples_that_may_not_fit_are_a_warning(enabled, plan_of):
    short = {**enabled, f"{MODEL}rollout__prompt_length": 1, f"{MODEL}rollout__response_length": 1}
    assert any("reads at most 2 tokens" in text for text in plan_of(**short).warnings)


def test_weights_that_do_not_fit_a_planned_device_are_refused(examine_on):
    keys = {
        "reward.reward_model.enable": True,
        "reward.reward_model.enable_resource_pool": True,
        "reward.reward_model.nnodes": 1,
        "reward.reward_model.model_path": "/models/Qwen3-32B",
        "reward.reward_model.rollout.tensor_model_parallel_size": 1,
    }
    _, found = examine_on("Qwen3-8B", keys)
    assert any("the reward model's weights take 65.5 GB" in text and "leaves 64.0 GB" in text for text in found.errors)
