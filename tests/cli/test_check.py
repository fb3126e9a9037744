import json
import subprocess
import sys
from pathlib import Path

import pytest

from verl.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
BILLION = 10**9


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_has_no_errors(script, check, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    for name in ("PLATFORM", "QUANTIZATION", "NODES", "ROLLOUT_NODES", "DEVICES", "MODELS", "DATA"):
        monkeypatch.delenv(name, raising=False)
    hardware = ("--device", "npu:ascend950") if script.parent.name == "ascend950" else ()
    status, answer = check(script, *hardware, "--without-files")
    assert answer["runs"][0]["errors"] == []
    assert status == 0 and len(answer["runs"]) == 1


LIST_MODULES = """
import sys
from verl.cli import main
status = main(sys.argv[1:])
loaded = [name for name in ("torch", "ray", "vllm", "transformers") if name in sys.modules]
sys.exit(f"loaded: {loaded}" if loaded else status)
"""


@pytest.mark.parametrize("model", ["Qwen3-32B", "model"])
def test_torch_ray_and_vllm_are_not_imported(script, model):
    """Covers a public model without files, and a run whose data is read and whose prompts are measured."""
    if model != "model":
        script.keys["actor_rollout_ref.model.path"] = f"/models/{model}"
    path = script.write()
    arguments = ["check", str(path), "--device", "npu:ascend950", "--without-files"]
    done = subprocess.run([sys.executable, "-c", LIST_MODULES, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert ("prompt lengths" in done.stdout) is (model == "model")


def test_numbers_of_a_32b_model_without_its_files(check, monkeypatch):
    """Expected values come from the public shape: 64 layers, hidden size 5120, 64 and 8 heads of 128, MLP of 25600."""
    hidden, width, heads, kv_heads, layers, words = 5120, 25600, 64 * 128, 8 * 128, 64, 151936
    matrices = layers * hidden * (2 * heads + 2 * kv_heads + 3 * width)
    vectors = layers * (2 * hidden + 2 * 128) + hidden
    plain = 2 * words * hidden + vectors
    sent = matrices * 33 // 32 + 2 * plain
    monkeypatch.setenv("MODEL", "Qwen3-32B")
    script = ROOT / "examples/ascend950/run.sh"
    status, answer = check(script, "--device", "npu:ascend950", "--without-files", "--bandwidth", "5.3")
    (run,) = answer["runs"]
    plan = run["plan"]
    assert status == 0
    assert plan["parameters"] == matrices + plain
    assert plan["update_bytes"] == sent
    assert run["update_seconds"] == pytest.approx(sent / 5.3e9)
    stages = {stage["name"]: stage["parts"] for stage in plan["device_memory"]["stages"]}
    # AdamW in float32, over 8 ranks: weights, two moments, and gradients during an update.
    assert stages["actor update"]["state of the trainer"] == pytest.approx(12 * plan["parameters"] / 8, rel=1e-6)
    assert stages["actor update"]["gradients"] == pytest.approx(4 * plan["parameters"] / 8, rel=1e-6)
    assert stages["generation"]["weights"] == pytest.approx(sent / plan["tensor_parallel"], rel=1e-6)
    # Keys and values in bfloat16: 2 x 128 numbers per head on the device and layer.
    token = 2 * 2 * 128 * layers * 8 // plan["tensor_parallel"]
    cache = plan["device_memory"]["cache_bytes"]
    assert plan["device_memory"]["cache_tokens"] == cache // token
    assert plan["device_memory"]["capacity"] == 128 * BILLION


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.sh"], "no such script"),
        (["a.b=1", "--nodes", "2"], "give --device too"),
        (["a.b=1", "--bandwidth", "0"], "must be above 0"),
        (["a.b=1", "--device", "npu:ascend950", "--nodes", "0"], "must be at least 1"),
    ],
)
def test_wrong_usage_has_status_2(arguments, words, capsys):
    assert main(["check", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["check"], ["check", "a=1", "--device", "tpu"], ["chek"], []])
def test_errors_of_argparse_have_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: verl" in capsys.readouterr().err


def test_a_script_without_training_command_has_status_2(tmp_path, capsys):
    script = tmp_path / "script.sh"
    script.write_text("echo nothing\n")
    assert main(["check", str(script)]) == 2
    assert "without a training command" in capsys.readouterr().err


def test_table_of_overrides_without_a_script(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = [f"{name}={value}" for name, value in script.keys.items()]
    assert main(["check", *words, "--device", "npu:ascend950dt"]) == 0
    shown = capsys.readouterr().out
    assert "npu, planned for npu:ascend950dt" in shown and "of 144 GB" in shown
    assert "longest 7 tokens in a sample of 64 prompts" in shown
    assert main(["check", *words, "--device", "npu:ascend950dt", "data.train_batch_size=31"]) == 1
    shown = capsys.readouterr().out
    assert "error: " in shown and "1 error(s)" in shown


def test_missing_files_are_warnings_with_without_files(script, check):
    script.train.unlink()
    script.keys["actor_rollout_ref.model.path"] = "/models/mine"
    path = script.write(before="python3 prepare.py")
    status, answer = check(path, "--device", "npu:ascend950")
    assert status == 1 and len(answer["runs"][0]["errors"]) == 2
    assert any("--without-files" in note for note in answer["runs"][0]["notes"])
    assert answer["not_run"] == [["python3", "prepare.py"]]
    status, answer = check(path, "--device", "npu:ascend950", "--without-files")
    assert status == 0 and len(answer["runs"][0]["warnings"]) == 2


def test_relative_paths_are_relative_to_the_directory_of_the_script(script, check):
    script.keys |= {"data.train_files": "train.parquet", "actor_rollout_ref.model.path": "model"}
    path = script.write(before='cd "$(dirname "$0")"')
    assert check(path, "--device", "npu:ascend950")[0] == 0
    path = script.write(before="cd /")
    status, answer = check(path, "--device", "npu:ascend950")
    assert status == 1 and "/model: does not exist" in "".join(answer["runs"][0]["errors"])


def test_without_device_the_run_is_checked_for_this_machine(script, check):
    status, answer = check(script.write(), "trainer.device=npu")
    assert status == 1 and "--device npu:ascend950" in answer["runs"][0]["errors"][0]


def test_json_output_is_one_object(script, capsys):
    main(["check", str(script.write()), "--device", "npu:ascend950", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"ok", "runs", "not_run"}
