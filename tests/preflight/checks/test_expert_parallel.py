"""Sizes of expert parallelism that an engine cannot have are refused before the start."""

import json

import pytest

ROLLOUT = "actor_rollout_ref.rollout."
SIZE, TENSORS = f"{ROLLOUT}expert_parallel_size", f"{ROLLOUT}tensor_model_parallel_size"
KWARGS = f"{ROLLOUT}engine_kwargs"
MOE = "Qwen3-30B-A3B"


def errors_about(found, words):
    return [text for text in found.errors if words in text]


def test_whole_experts_fit_where_their_slices_do_not(examine_on):
    """768 inputs of an expert: 96 on each of 8 devices, which vllm-ascend cannot pair; whole experts it can."""
    sliced, found = examine_on(MOE, {TENSORS: 8})
    assert "use actor_rollout_ref.rollout.expert_parallel_size=8, or leave it out" in found.errors[0]
    whole, found = examine_on(MOE, {TENSORS: 8, SIZE: 8})
    assert sliced is None and found.errors == []
    assert "1 replica(s) x 8 tensor parallel and 8 expert parallel" in whole.render()


@pytest.mark.parametrize(
    ("model", "keys", "words"),
    [
        (MOE, {SIZE: 2}, ("expert_parallel_size=2: must be 1 or", "tensor_model_parallel_size=4", "both keys")),
        (MOE, {TENSORS: 1, SIZE: 8}, ("expert_parallel_size=8: must be 1 or", "tensor_model_parallel_size=1")),
        (MOE, {SIZE: 0}, ("expert_parallel_size=0: must be at least 1",)),
        ("Qwen3-8B", {SIZE: 4}, ("expert_parallel_size=4: the model in /models/Qwen3-8B has no experts", "use 1")),
    ],
)
def test_sizes_that_an_engine_cannot_have_are_refused(examine_on, model, keys, words):
    _, found = examine_on(model, {TENSORS: 4} | keys)
    [problem] = errors_about(found, SIZE)
    assert all(word in problem for word in words), problem


def test_the_size_must_divide_the_experts(problem_of, run_files):
    path = run_files.model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_experts": 9, "model_type": "qwen3_moe"}))
    keys = {TENSORS: 2, SIZE: 2, "trainer.n_gpus_per_node": 2}
    assert "must divide the 9 experts" in problem_of(**{key.replace(".", "__"): value for key, value in keys.items()})


def test_a_teacher_is_checked_too(examine_on):
    teacher = "distillation.teacher_models.teacher_model."
    keys = {"distillation.enabled": True, "distillation.nnodes": 1, f"{teacher}model_path": f"/models/{MOE}"}
    inference = f"{teacher}inference."
    keys |= {f"{inference}tensor_model_parallel_size": 4, f"{inference}expert_parallel_size": 2}
    _, found = examine_on("Qwen3-8B", keys)
    assert errors_about(found, f"{inference}expert_parallel_size=2: must be 1 or")
    _, found = examine_on("Qwen3-8B", keys | {f"{inference}expert_parallel_size": 4})
    assert not errors_about(found, "expert_parallel_size")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"enable_eplb": True}, "vllm.enable_eplb=True: moves experts"),
        ({"additional_config": {"dynamic_eplb": True}}, "additional_config.dynamic_eplb=True: moves experts"),
        ({"additional_config": {"expert_map_path": "map.json"}}, "additional_config.expert_map_path=map.json: moves"),
        (
            {"additional_config": {"eplb_config": {"dynamic_eplb": True}}},
            "additional_config.eplb_config.dynamic_eplb=True: moves experts",
        ),
        ({"enable_expert_parallel": False}, "enable_expert_parallel=False: would reach the engine but not the trainer"),
        ({"expert_placement_strategy": "round_robin"}, "expert_placement_strategy=round_robin: vllm-ascend"),
    ],
)
def test_experts_that_move_are_refused(examine_on, arguments, words):
    given = json.dumps(arguments).replace('"', "").replace(":", ": ")
    keys = {TENSORS: 4, SIZE: 4}
    _, found = examine_on(MOE, keys | {f"{KWARGS}.vllm": given})
    [problem] = errors_about(found, KWARGS)
    assert words in problem


def test_experts_are_not_divided_by_the_engine_alone(examine_on):
    _, found = examine_on(MOE, {TENSORS: 4, f"{KWARGS}.vllm": "{enable_expert_parallel: True}"})
    [problem] = errors_about(found, KWARGS)
    assert problem.endswith(f"set {SIZE} to the value of tensor_model_parallel_size")


def test_a_model_that_is_known_by_name_only_is_checked_without_its_experts(examine_on):
    for model in ("Qwen3-VL-30B-A3B-Instruct", "somebodys-model"):
        _, found = examine_on(model, {TENSORS: 4, SIZE: 4})
        assert not errors_about(found, SIZE)


def test_experts_that_stay_are_accepted(examine_on):
    stays = "enable_eplb: False, expert_placement_strategy: linear, additional_config: {eplb_config: {}}"
    placement = f"{{enable_expert_parallel: True, {stays}}}"
    _, found = examine_on(MOE, {TENSORS: 4, SIZE: 4, f"{KWARGS}.vllm": placement})
    assert found.errors == []
