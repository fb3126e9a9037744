import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.script import row
from verl.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
BILLION = 10**9
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_example_has_no_errors(script, check, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/nobody")
    for name in ("PLATFORM", "QUANTIZATION", "NODES", "ROLLOUT_NODES", "DEVICES", "MODELS", "DATA"):
        monkeypatch.delenv(name, raising=False)
    hardware = ("--device", "npu:ascend950") if script.parent.name == "ascend950" else ()
    status, output = check(script, *hardware, "--without-files")
    assert output["runs"][0]["errors"] == []
    assert status == 0 and len(output["runs"]) == 1


LIST_MODULES = """
import sys
from verl.cli import main
status = main(sys.argv[1:])
loaded = [name for name in ("torch", "ray", "vllm", "transformers") if name in sys.modules]
sys.exit(f"loaded: {loaded}" if loaded else status)
"""


@pytest.mark.slow
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


@pytest.mark.slow
def test_numbers_of_a_32b_model_without_its_files(check, monkeypatch):
    """Expected values come from the public shape: 64 layers, hidden size 5120, 64 and 8 heads of 128, MLP of 25600."""
    hidden, width, heads, kv_heads, layers, words = 5120, 25600, 64 * 128, 8 * 128, 64, 151936
    matrices = layers * hidden * (2 * heads + 2 * kv_heads + 3 * width)
    vectors = layers * (2 * hidden + 2 * 128) + hidden
    plain = 2 * words * hidden + vectors
    sent = matrices * 33 // 32 + 2 * plain
    monkeypatch.setenv("MODEL", "Qwen3-32B")
    script = ROOT / "examples/ascend950/run.sh"
    status, output = check(script, "--device", "npu:ascend950", "--without-files", "--bandwidth", "5.3")
    (run,) = output["runs"]
    plan = run["plan"]
    assert status == 0
    assert plan["parameters"] == matrices + plain
    assert plan["update_bytes"] == sent
    assert run["update_seconds"] == pytest.approx(sent / 5.3e9)
    stages = {stage["name"]: stage["parts"] for stage in plan["device_memory"]["stages"]}
    # AdamW in float32, over 8 ranks: weights, two moments, and gradients during an update. Encoded in MXFP8, for
    # quantization-aware training: 33 bytes for 32 weights.
    state = (12 + 33 / 32) * plan["parameters"] / 8
    assert stages["actor update"]["state of the trainer"] == pytest.approx(state, rel=1e-6)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_missing_files_are_warnings_with_without_files(script, check):
    script.train.unlink()
    script.keys["actor_rollout_ref.model.path"] = "/models/mine"
    path = script.write(before="python3 prepare.py")
    status, output = check(path, "--device", "npu:ascend950")
    assert status == 1 and len(output["runs"][0]["errors"]) == 2
    assert any("--without-files" in note for note in output["runs"][0]["notes"])
    assert output["not_run"] == [["python3", "prepare.py"]]
    status, output = check(path, "--device", "npu:ascend950", "--without-files")
    assert status == 0 and len(output["runs"][0]["warnings"]) == 2


@pytest.mark.slow
def test_relative_paths_are_relative_to_the_directory_of_the_script(script, check):
    script.keys |= {"data.train_files": "train.parquet", "actor_rollout_ref.model.path": "model"}
    path = script.write(before='cd "$(dirname "$0")"')
    assert check(path, "--device", "npu:ascend950")[0] == 0
    path = script.write(before="cd /")
    status, output = check(path, "--device", "npu:ascend950")
    assert status == 1 and "/model: does not exist" in "".join(output["runs"][0]["errors"])


def test_without_device_the_run_is_checked_for_this_machine(script, check):
    status, output = check(script.write(), "trainer.device=npu")
    assert status == 1 and "--device npu:ascend950" in output["runs"][0]["errors"][0]


def test_json_output_is_one_object(script, capsys):
    main(["check", str(script.write()), "--device", "npu:ascend950", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"ok", "runs", "not_run"}


# ---- one fault in a valid script ------------------------------------------------------------------------------------


def planted(name, finds, fix, **changes):
    return pytest.param(changes, finds, fix, id=name)


FAULTS = [
    planted(
        "unknown key",
        ["actor_rollout_ref.rollout.temprature"],
        "actor_rollout_ref.rollout.temperature",
        keys={f"{ROLLOUT}.temprature": 1.0},
    ),
    planted(
        "mini-batch that does not divide",
        ["ppo_mini_batch_size=12", "data.train_batch_size=32"],
        "use 8 or 16",
        keys={f"{ACTOR}.ppo_mini_batch_size": 12},
    ),
    planted(
        "attention heads among devices",
        ["tensor_model_parallel_size=8", "6 attention heads"],
        "use one of 1, 2, 6",
        config={"num_attention_heads": 6},
        keys={f"{ROLLOUT}.tensor_model_parallel_size": 8, f"{ROLLOUT}.quantization": "null"},
    ),
    planted(
        "MXFP8 blocks cut by a rank",
        ["mlp.down_proj", "752 inputs", "376 per rank"],
        "use tensor_model_parallel_size=1, or leave it out",
        config={"intermediate_size": 752},
    ),
    planted(
        "prompts longer than the cap",
        ["data.max_prompt_length=64", "train.parquet, row 63", "with 83"],
        "raise it to 83 or more, or set data.filter_overlong_prompts=True",
        rows=[row()] * 63 + [row(words=80)],
    ),
    planted(
        "a row without a message",
        ["train.parquet, row 40", "'prompt' is an empty list"],
        "it must be a list of messages",
        rows=[row()] * 40 + [row(prompt=[])] + [row()] * 20,
    ),
    planted(
        "a data source without a scorer",
        ["train.parquet, row 7", "data_source=mine"],
        "set reward.custom_reward_function.path",
        rows=[row()] * 7 + [row(data_source="mine")] + [row()] * 30,
    ),
    planted(
        "a row without a correct answer",
        ["train.parquet, row 5", "reward_model.ground_truth"],
        "every row needs the correct answer",
        rows=[row()] * 5 + [row(reward_model={"style": "rule", "ground_truth": None})] + [row()] * 30,
    ),
    planted(
        "samples longer than the model's positions",
        ["data.max_response_length=2048", "1024 positions"],
        "lower their sum to at most 1024",
        keys={"data.max_response_length": 2048},
    ),
    planted(
        "a token budget that no sample fits",
        ["ppo_max_token_len_per_gpu=100", "128 tokens"],
        "use at least 128",
        keys={f"{ACTOR}.ppo_max_token_len_per_gpu": 100},
    ),
    planted(
        "an engine that leaves the trainer no memory",
        ["generation needs about", "128.0 GB"],
        "set actor_rollout_ref.rollout.gpu_memory_utilization=0.9",
        keys={f"{ROLLOUT}.gpu_memory_utilization": 0.99},
    ),
    planted(
        "an engine without room for its weights",
        ["gpu_memory_utilization=0.02", "cannot hold the engine's weights"],
        "raise one of the two",
        keys={f"{ROLLOUT}.gpu_memory_utilization": 0.02},
    ),
    planted(
        "quantization of another device",
        ["quantization=fp8", "not on npu"],
        "use ascend there",
        keys={f"{ROLLOUT}.quantization": "fp8"},
    ),
    planted(
        "an environment in which the engine cannot sleep",
        ["PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"],
        "remove it",
        before="export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
    ),
    planted(
        "a reward function of another name",
        ["reward.custom_reward_function.name=compute_scores"],
        "did you mean compute_score?",
        keys={"reward.custom_reward_function.name": "compute_scores"},
        reward=True,
    ),
    planted(
        "more nodes than there are",
        ["--nodes 2", "needs 4 nodes"],
        "use --nodes 4",
        keys={f"{ROLLOUT}.nnodes": 3, f"{ROLLOUT}.checkpoint_engine.backend": "hccl"},
    ),
    planted(
        "shared memory across nodes",
        ["checkpoint_engine.backend=naive"],
        "use hccl",
        keys={f"{ROLLOUT}.nnodes": 2},
        nodes=3,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "finds", "fix"), FAULTS)
def test_each_fault_is_reported_with_its_fix(script, check, changes, finds, fix):
    script.config(**changes.get("config", {}))
    if "rows" in changes:
        script.rows(changes["rows"])
    if changes.get("reward"):
        script.keys["reward.custom_reward_function.path"] = script.reward
    script.keys |= changes.get("keys", {})
    hardware = ("--device", "npu:ascend950", "--nodes", changes.get("nodes", 2))
    status, output = check(script.write(changes.get("before", "")), *hardware)
    errors = output["runs"][0]["errors"]
    assert status == 1 and len(errors) == 1, errors
    assert fix in errors[0]
    assert all(text in errors[0] for text in finds), errors[0]


def test_the_script_without_faults_has_no_errors(script, check):
    status, output = check(script.write(), "--device", "npu:ascend950")
    assert (status, output["ok"], output["runs"][0]["errors"]) == (0, True, [])
    assert output["runs"][0]["plan"]["prompt_lengths"] == {"measured": 64, "median": 7, "longest": 7, "over": 0}


def test_several_faults_are_reported_together(script, check):
    script.keys |= {f"{ACTOR}.ppo_mini_batch_size": 12, f"{ROLLOUT}.gpu_memory_utilization": 0.99}
    script.rows([row(data_source="mine")] * 40)
    status, output = check(script.write(), "--device", "npu:ascend950")
    text = "\n".join(output["runs"][0]["errors"])
    assert status == 1 and len(output["runs"][0]["errors"]) == 3
    assert all(words in text for words in ("ppo_mini_batch_size=12", "data_source=mine", "generation needs about"))


@pytest.mark.slow
def test_the_reward_function_is_called_in_another_process(script, check):
    head = "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    print('called')\n    "
    device = ("--device", "npu:ascend950")
    script.keys["reward.custom_reward_function.path"] = script.reward
    script.reward.write_text(head + "return float(solution_str == ground_truth)\n")
    status, output = check(script.write(), *device)
    assert status == 0 and output["runs"][0]["warnings"] == []
    script.reward.write_text(head + "return extra_info['level']\n")
    status, output = check(script.write(), *device)
    error = output["runs"][0]["errors"][0]
    assert status == 1 and "reads extra_info['level'], which the row does not have" in error
    # The run is planned for another machine, where the service of the reward may run.
    script.reward.write_text(head + "raise ConnectionError('down')\n")
    status, output = check(script.write(), *device, "--without-files")
    assert status == 0 and "ConnectionError: down" in output["runs"][0]["warnings"][0]
