"""`verl check` of a script for Megatron: what FSDP2 has in its place, and `--translate`."""

import subprocess

import pytest

from verl.cli import main

MEGATRON = "actor_rollout_ref.actor.megatron"


@pytest.fixture
def megatron(script):
    script.keys |= {
        "model_engine": "megatron",
        f"{MEGATRON}.tensor_model_parallel_size": 2,
        f"{MEGATRON}.pipeline_model_parallel_size": 2,
        f"{MEGATRON}.param_offload": True,
    }
    return script


def main_status(script, *arguments):
    return main(["check", str(script.write()), *map(str, arguments)])


def test_the_check_names_the_keys_of_fsdp2_and_is_an_error(megatron, check):
    status, output = check(megatron.write(), "--device", "npu:ascend950")
    [run] = output["runs"]
    assert status == 1
    assert "Megatron" in run["errors"][0] and "--translate FILE" in run["errors"][0] and len(run["errors"]) == 1
    notes = "\n".join(run["notes"])
    assert f"{MEGATRON}.param_offload=True becomes actor_rollout_ref.actor.fsdp_config.param_offload=True" in notes
    assert f"no key replaces {MEGATRON}.pipeline_model_parallel_size=2: FSDP2 gives each rank a part" in notes


@pytest.mark.slow
def test_the_translated_script_has_no_errors(megatron, check, tmp_path):
    file = tmp_path / "fsdp.sh"
    status, output = check(megatron.write(), "--translate", file, "--device", "npu:ascend950")
    assert status == 0 and output["runs"][0]["errors"] == []
    text = file.read_text()
    assert "megatron.tensor_model_parallel_size" not in text.split("set -euo", 1)[1]
    assert "# for FSDP2, no key replaces model_engine=megatron" in text
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    again, translated = check(file, "--device", "npu:ascend950")
    assert again == 0 and translated["runs"][0]["overrides"] == output["runs"][0]["overrides"]


def test_what_changes_the_training_is_not_written(megatron, tmp_path, capsys):
    megatron.keys["+actor_rollout_ref.model.mtp.enable_train"] = True
    file = tmp_path / "fsdp.sh"
    assert main_status(megatron, "--translate", file) == 2
    assert "mtp.enable_train=True: a model predicts one token at a time" in capsys.readouterr().err
    assert not file.exists()


def test_an_existing_file_is_kept(megatron, tmp_path, capsys):
    file = tmp_path / "fsdp.sh"
    file.write_text("mine")
    assert main_status(megatron, "--translate", file) == 2
    assert "exists already" in capsys.readouterr().err and file.read_text() == "mine"


def test_a_script_for_fsdp2_has_nothing_to_translate(script, tmp_path, capsys):
    assert main_status(script, "--translate", tmp_path / "fsdp.sh") == 2
    assert "names no other engine than FSDP2" in capsys.readouterr().err
