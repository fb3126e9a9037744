"""The files that a config names, and the changes that are found in them."""

import json
from dataclasses import replace

import pytest

from fixtures.run_files import with_overrides
from verl.config import PPOConfig
from verl.config.schema import key_of, walk
from verl.preflight.inputs import (
    INPUTS_FILE,
    RunInputs,
    changed_inputs,
    collect_inputs,
    read_inputs,
    write_inputs,
)
from verl.preflight.inputs import _input_paths as input_paths

# Paths that a run writes to, or whose files are compared by themselves.
OUTPUTS = {
    "skip.rollout.dump_dir",
    "trainer.default_local_dir",
    "trainer.resume_from_path",
    "trainer.rollout_data_dir",
    "trainer.validation_data_dir",
    "trainer.timeline",
}


@pytest.fixture
def inputs_of(run_files):
    """A function that returns the inputs of the valid config with changes."""
    return lambda **changes: collect_inputs(with_overrides(run_files.overrides(**changes)), "cpu")


def test_every_key_that_names_a_file_is_an_input_or_an_output(tmp_path):
    config = PPOConfig()
    config.algorithm.adv_estimator = "gae"
    paths = {name for name, field, _ in walk(config) if key_of(field).path}
    inputs = {name for name, _ in input_paths(config)}
    assert paths - inputs == OUTPUTS
    assert {
        "data.train_files",
        "data.val_files",
        "data.custom_cls.path",
        "reward.custom_reward_function.path",
        "actor_rollout_ref.model.external_lib",
    } <= inputs


def test_files_are_named_by_key(inputs_of, run_files):
    (run_files.model / "README.md").write_text("not an input")
    files = inputs_of().files
    assert {key: sorted(names) for key, names in files.items()} == {
        "data.train_files": ["train.parquet"],
        "data.val_files": ["val.parquet"],
        "actor_rollout_ref.model.path": ["config.json", "model.safetensors", "tokenizer.json"],
        "reward.custom_reward_function.path": ["reward.py"],
    }
    assert files["data.train_files"]["train.parquet"]["bytes"] == run_files.train.stat().st_size


def test_the_critic_counts_only_in_a_run_that_has_one(inputs_of, run_files):
    critic = {"critic__model__path": run_files.model}
    assert "critic.model.path" not in inputs_of(**critic).files
    assert "critic.model.path" in inputs_of(**critic, algorithm__adv_estimator="gae").files


def test_files_with_the_same_name_are_kept_apart(inputs_of, run_files):
    other = run_files.root / "other" / "train.parquet"
    other.parent.mkdir()
    run_files.write_prompts(other, 3)
    names = inputs_of(data__train_files=f"[{run_files.train},{other}]").files["data.train_files"]
    assert list(names) == ["train.parquet", str(other)]


def test_a_moved_input_with_the_same_content_is_no_change(inputs_of, run_files, tmp_path):
    before = inputs_of()
    moved = tmp_path / "moved"
    run_files.model.rename(moved)
    data = tmp_path / "data"
    data.mkdir()
    train = run_files.train.rename(data / "train.parquet")
    paths = {"actor_rollout_ref__model__path": moved, "data__train_files": train}
    assert changed_inputs(before, inputs_of(**paths)) == []
    run_files.write_prompts(train, 41)
    assert changed_inputs(before, inputs_of(**paths)) == ["data.train_files: content changed: train.parquet"]


def test_other_files_are_a_change_of_the_config_only(inputs_of, run_files):
    other = run_files.write_prompts(run_files.root / "other.parquet", 3)
    assert changed_inputs(inputs_of(), inputs_of(data__train_files=other)) == []


def test_python_files_that_a_yaml_file_names_are_inputs(inputs_of, run_files):
    folder = run_files.root / "loops"
    folder.mkdir()
    (folder / "loops.yaml").write_text("- {name: a, _target_: 'mine.py:Loop'}\n- {name: b, _target_: other.Loop}\n")
    (folder / "mine.py").write_text("import shared\nclass Loop: ...\n")
    (folder / "shared.py").write_text("")
    key = "actor_rollout_ref.rollout.agent.agent_loop_config_path"
    changes = {key.replace(".", "__"): folder / "loops.yaml"}
    before = inputs_of(**changes)
    assert sorted(before.files[key]) == ["loops.yaml", "mine.py", "shared.py"]
    (folder / "shared.py").write_text("depth = 2\n")
    assert changed_inputs(before, inputs_of(**changes)) == [f"{key}: content changed: shared.py"]


def test_the_python_files_of_a_tokenizer_and_shards_are_inputs(inputs_of, run_files):
    model = run_files.model
    run_files.weights.unlink()
    run_files.write_safetensors(model / "a.safetensors", {"x": (2, 2)})
    run_files.write_safetensors(model / "b.safetensors", {"y": (2, 2)})
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "modeling_own.py").write_text("")
    names = inputs_of().files["actor_rollout_ref.model.path"]
    assert sorted(names) == ["a.safetensors", "b.safetensors", "config.json", "modeling_own.py", "tokenizer.json"]


def test_many_changed_names_are_shortened(inputs_of, run_files):
    for i in range(8):
        (run_files.model / f"extra_{i}.json").write_text("{}")
    before = inputs_of()
    for i in range(8):
        (run_files.model / f"extra_{i}.json").write_text("[]")
    names = ", ".join(f"extra_{i}.json" for i in range(5))
    assert changed_inputs(before, inputs_of()) == [f"actor_rollout_ref.model.path: content changed: {names} and 3 more"]


def test_stored_inputs_are_read_again(inputs_of, tmp_path):
    inputs = inputs_of()
    write_inputs(inputs, tmp_path)
    assert read_inputs(tmp_path) == inputs
    assert {"device", "python", "verl", "torch", "transformers"} <= inputs.versions.keys()


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"format": 2, "files": {}, "versions": {}, "verl_code": ""}'])
def test_damaged_or_unknown_inputs_are_none(tmp_path, text):
    if text is not None:
        (tmp_path / INPUTS_FILE).write_text(text)
    assert read_inputs(tmp_path) is None


def test_no_change_without_files():
    empty = RunInputs({}, {}, "")
    assert changed_inputs(empty, empty) == []


def test_other_versions_and_other_code_are_changes(inputs_of):
    now = inputs_of()
    versions = {**now.versions, "torch": "2.0.0", "vllm-ascend": "0.23.0"}
    before = replace(now, versions=versions)
    present = {name: now.versions.get(name, "none") for name in ("torch", "vllm-ascend")}
    assert changed_inputs(before, now) == [
        f"torch: 2.0.0 -> {present['torch']}",
        f"vllm-ascend: 0.23.0 -> {present['vllm-ascend']}",
    ]
    [line] = changed_inputs(replace(now, verl_code="other"), now)
    assert line.startswith("verl: other source code under the same version ")
