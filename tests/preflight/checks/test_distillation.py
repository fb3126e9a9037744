"""Checks of distillation: a teacher that cannot score the policy's samples is refused before the start."""

import json
import shutil

import pytest

from fixtures.tiny import write_tiny_model
from verl.config import ConfigError, load_config

TEACHER = "distillation__teacher_models__teacher_model__"
LOSS = "distillation__distillation_loss__"


@pytest.fixture
def teacher(tmp_path):
    return write_tiny_model(tmp_path / "teacher", seed=1)


@pytest.fixture
def enabled(teacher):
    return {
        "distillation__enabled": True,
        "distillation__nnodes": 1,
        "distillation__n_gpus_per_node": 2,
        f"{TEACHER}model_path": teacher,
        f"{TEACHER}inference__tensor_model_parallel_size": 1,
    }


def test_the_plan_shows_the_teacher_and_its_memory(enabled, plan_of):
    plan, without = plan_of(**enabled), plan_of()
    assert "teacher, 2 engine(s) x 1 tensor parallel; loss k3 and task rewards" in plan.render()
    assert "engine(s)" not in without.render()
    assert plan.memory.other_bytes > without.memory.other_bytes + 2 * 2**30


def test_without_distillation_its_keys_have_no_effect(plan_of, teacher):
    notes = plan_of(**{f"{TEACHER}model_path": teacher, f"{LOSS}loss_mode": "k1"}).notes
    assert any("distillation.enabled=False" in note and "loss_mode" in note and "model_path" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{TEACHER}model_path": "null"}, ("model_path is not set", "distillation.enabled=False")),
        ({f"{TEACHER}model_path": "/no/such/teacher"}, ("model_path=/no/such/teacher",)),
        ({"distillation__nnodes": 0}, ("distillation.nnodes=0", "devices of its own")),
        (
            {f"{TEACHER}inference__tensor_model_parallel_size": 3},
            ("inference.tensor_model_parallel_size=3", "does not divide distillation.n_gpus_per_node=2"),
        ),
        ({f"{TEACHER}inference__max_model_len": 32}, ("inference.max_model_len=32", "up to 33")),
        ({f"{TEACHER}key": "openai/gsm8k"}, (f"{TEACHER}key=openai/gsm8k".replace("__", "."), "several teachers")),
        ({f"{TEACHER}inference__name": "sglang"}, ("inference.name=sglang", "use vllm")),
        ({f"{LOSS}loss_mode": "k1"}, ("loss_mode=k1 with use_policy_gradient=False", "use k3")),
        ({f"{LOSS}loss_mode": "forward_kl_topk"}, ("loss_mode=forward_kl_topk", "use k1 with use_policy_gradient")),
        ({"actor_rollout_ref__rollout__temperature": 0.7}, ("rollout.temperature=0.7", "temperature 1")),
        (
            {f"{LOSS}use_task_rewards": False, "actor_rollout_ref__actor__entropy_coeff": 0.1},
            ("actor.entropy_coeff=0.1", "only the distillation loss is trained on"),
        ),
    ],
)
def test_what_cannot_be_right_is_refused(enabled, problem_of, changes, words):
    problem = problem_of(**{**enabled, **changes})
    assert all(word in problem for word in words), problem


def test_several_teachers_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"distillation\.teacher_models.*several teachers are not supported"):
        load_config(["distillation.enabled=True", "+distillation.teacher_models.math.model_path=/models/math"])


def test_arguments_of_other_engines_are_refused(examine_on):
    engine_kwargs = "distillation.teacher_models.teacher_model.inference.engine_kwargs"
    _, found = examine_on("Qwen3-8B", {"distillation.enabled": True, f"+{engine_kwargs}.sglang.x": 1})
    assert any(text.startswith(f"{engine_kwargs}: has sglang; only vllm") for text in found.errors)


def test_a_teacher_with_another_vocabulary_is_refused(enabled, problem_of, teacher, tmp_path):
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    policy = write_tiny_model(tmp_path / "policy")
    problem = problem_of(**enabled, actor_rollout_ref__model__path=policy)
    assert f"model_path={teacher}: its tokenizer lacks 2 of the policy's" in problem
    assert "'a'" in problem and "use a teacher with the policy's tokenizer" in problem


def test_a_teacher_with_more_tokens_is_accepted(enabled, plan_of, teacher, tmp_path):
    file = teacher / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["<more>"] = max(content["model"]["vocab"].values()) + 50
    file.write_text(json.dumps(content))
    assert plan_of(**enabled, actor_rollout_ref__model__path=write_tiny_model(tmp_path / "policy")).served


def test_a_teacher_that_is_too_short_is_refused(enabled, problem_of, teacher, tmp_path):
    short = shutil.copytree(teacher, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    problem = problem_of(**{**enabled, f"{TEACHER}model_path": short})
    assert "has 32 positions" in problem and "up to 33" in problem


def test_weights_that_do_not_fit_a_planned_device_are_refused(examine_on):
    keys = {
        "distillation.enabled": True,
        "distillation.nnodes": 1,
        "distillation.teacher_models.teacher_model.model_path": "/models/Qwen3-32B",
        "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size": 1,
    }
    _, found = examine_on("Qwen3-8B", keys)
    assert any("the teacher's weights take 65.5 GB" in text and "leaves 64.0 GB" in text for text in found.errors)
    key = "distillation.teacher_models.teacher_model.inference.tensor_model_parallel_size"
    _, found = examine_on("Qwen3-8B", {**keys, key: 2})
    assert not [text for text in found.errors if "teacher" in text]
