"""The script for Ascend 950 passes the check for each model, algorithm and kind of hardware."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from verl.config import load_config
from verl.preflight.check import examine
from verl.preflight.target import Hardware, Target
from verl.utils.vllm.npu_settings import check_npu_settings

SCRIPT = Path(__file__).resolve().parents[2] / "examples/ascend950/run.sh"
# Name of the experiment by model.
MODELS = {
    "Qwen2.5-7B-Instruct": "qwen2.5_7b",
    "Qwen3-0.6B": "qwen3_0.6b",
    "Qwen3-30B-A3B": "qwen3_30b_a3b",
    "Qwen3-32B": "qwen3_32b",
    "Qwen3-8B": "qwen3_8b",
}
RUNS = [(model, algorithm) for model in MODELS for algorithm in ("grpo", "ppo")]
WAYS = {
    "npu": ({}, Hardware("npu:ascend950", 1)),
    "npu-2-nodes": ({"NODES": "2"}, Hardware("npu:ascend950", 2)),
    "npu-3-nodes": ({"ROLLOUT_NODES": "2"}, Hardware("npu:ascend950", 3)),
    "cuda-fp8": ({"PLATFORM": "cuda"}, Hardware("cuda:h200", 1)),
    "cuda-plain-2-nodes": (
        {"PLATFORM": "cuda", "QUANTIZATION": "null", "ROLLOUT_NODES": "1"},
        Hardware("cuda:h200", 2),
    ),
}


def test_the_readme_lists_every_model():
    readme = SCRIPT.with_name("README.md").read_text()
    assert set(re.findall(r"^\| `(Qwen[^`]+)`", readme, re.MULTILINE)) == set(MODELS)


def cases():
    """Every model and algorithm in every way. The last way is made of parts of the others: one model is enough."""
    *most, last = WAYS
    yield from ((model, algorithm, way) for model, algorithm in RUNS for way in most)
    yield from ((model, algorithm, last) for model, algorithm in RUNS if model == "Qwen3-8B")


@pytest.mark.parametrize(("model", "algorithm", "way"), cases())
def test_the_script_passes_the_check(model, algorithm, way, overrides_of):
    environment, hardware = WAYS[way]
    environment = {**environment, "MODEL": model, "ALGORITHM": algorithm, "HOME": "/home/of/nobody"}
    config = load_config(overrides_of(SCRIPT, **environment))
    plan, found = examine(config, Target(starting=False, hardware=hardware, without_files=True))
    assert found.errors == []
    # Only the two data files are missing; there is no other warning.
    assert [text for text in found.warnings if "data file /home/of/nobody/data/" not in text] == []
    assert plan is not None
    assert plan.device == hardware.device
    assert plan.parameters is not None
    rollout = config.actor_rollout_ref.rollout
    assert rollout.nnodes + config.trainer.nnodes == hardware.nodes
    assert rollout.quantization == {"npu": "ascend", "cuda-fp8": "fp8"}.get(re.sub(r"-\d-nodes$", "", way))
    assert config.trainer.experiment_name == f"{algorithm}_{MODELS[model]}"
    assert config.algorithm.adv_estimator == {"grpo": "grpo", "ppo": "gae"}[algorithm]


@pytest.mark.parametrize(("model", "algorithm"), RUNS)
def test_user_overrides_come_last(model, algorithm, overrides_of):
    given = ["actor_rollout_ref.rollout.gpu_memory_utilization=0.1", "trainer.device=cpu"]
    assert overrides_of(SCRIPT, *given, MODEL=model, ALGORITHM=algorithm)[-2:] == given


@pytest.mark.parametrize(
    ("variable", "message"),
    [({"MODEL": "Qwen9"}, "MODEL=Qwen9: use Qwen3-0.6B"), ({"ALGORITHM": "dqn"}, "ALGORITHM=dqn: use grpo or ppo")],
)
def test_an_unknown_model_or_algorithm_is_an_error(variable, message):
    done = subprocess.run([SCRIPT], env={**os.environ, **variable}, timeout=30, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


def sourced(**environment: str) -> dict[str, str]:
    """The environment after sourcing the script in a strict shell."""
    command = f"set -euo pipefail; source {SCRIPT}; env -0"
    full = {"PATH": os.environ["PATH"], "HOME": "/home/of/nobody", **environment}
    done = subprocess.run(["bash", "-c", command], env=full, check=True, timeout=30, capture_output=True, text=True)
    return dict(pair.split("=", 1) for pair in done.stdout.removesuffix("\0").split("\0"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, None),
        ("expandable_segments:True", None),
        ("max_split_size_mb:64, Expandable_Segments: true,garbage_collection_threshold:0.9",
         "max_split_size_mb:64,garbage_collection_threshold:0.9"),
        ("expandable_segments:False", "expandable_segments:False"),
    ],
)  # fmt: skip
def test_the_environment_is_one_that_a_replica_on_an_npu_accepts(before, after):
    given = {"VLLM_ASCEND_ENABLE_NZ": "1", "VLLM_PLUGINS": "ascend"}
    environment = sourced(**given, **({} if before is None else {"PYTORCH_NPU_ALLOC_CONF": before}))
    check_npu_settings(environment, sleep_mode=True)
    assert environment.get("PYTORCH_NPU_ALLOC_CONF") == after
    assert "VLLM_PLUGINS" not in environment


def test_on_gpus_nothing_is_set_for_an_npu():
    environment = sourced(PLATFORM="cuda", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True,max_split_size_mb:64")
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert not [name for name in environment if "ASCEND" in name or "NPU" in name or "HCCL" in name]


def test_an_unknown_platform_ends_a_script_with_what_to_use():
    done = subprocess.run([SCRIPT], env={**os.environ, "PLATFORM": "tpu"}, timeout=30, capture_output=True, text=True)
    assert done.returncode == 2
    assert "PLATFORM=tpu: use npu or cuda" in done.stderr


def test_sourcing_changes_no_shell_option_and_starts_nothing():
    """Does not raise."""
    command = f"before=$-; source {SCRIPT}; [ $before = $- ]"
    subprocess.run(["bash", "-c", command], check=True, timeout=30)
