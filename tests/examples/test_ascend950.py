"""The scripts for Ascend 950: each passes the check for the hardware that it names, in every way that env.sh offers."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from verl.config import load_config
from verl.preflight.check import examine
from verl.preflight.target import Hardware, Scope
from verl.utils.vllm.npu_settings import check_npu_environment

FOLDER = Path(__file__).resolve().parents[2] / "examples/ascend950"
SCRIPTS = sorted(path for path in FOLDER.glob("*.sh") if path.name != "env.sh")
MODELS = ("qwen2.5_7b", "qwen3_0.6b", "qwen3_30b_a3b", "qwen3_32b", "qwen3_8b")
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


def test_there_is_one_for_each_model_and_algorithm():
    assert {path.stem for path in SCRIPTS} == {f"{kind}_{model}" for kind in ("grpo", "ppo") for model in MODELS}


def cases():
    """Every script in every way; the last one, which is made of parts of the others, with one model."""
    *most, last = WAYS
    yield from ((script, way) for script in SCRIPTS for way in most)
    yield from ((script, last) for script in SCRIPTS if script.stem.endswith("qwen3_8b"))


@pytest.mark.parametrize(("script", "way"), cases(), ids=lambda value: getattr(value, "stem", value))
def test_it_passes_the_check(script, way, overrides_of):
    environment, hardware = WAYS[way]
    config = load_config(overrides_of(script, **environment, HOME="/home/of/nobody"))
    plan, found = examine(config, Scope(starting=False, hardware=hardware, without_files=True))
    assert found.errors == []
    # The data files, two of them, are not here; and nothing else disappoints.
    assert [text for text in found.warnings if "data file /home/of/nobody/data/" not in text] == []
    assert plan is not None
    assert plan.device == hardware.device
    assert plan.parameters is not None
    rollout = config.actor_rollout_ref.rollout
    assert rollout.nnodes + config.trainer.nnodes == hardware.nodes
    assert rollout.quantization == {"npu": "ascend", "cuda-fp8": "fp8"}.get(re.sub(r"-\d-nodes$", "", way))
    assert config.trainer.experiment_name == script.stem
    assert config.algorithm.adv_estimator == {"grpo": "grpo", "ppo": "gae"}[script.stem.partition("_")[0]]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_the_user_says_comes_last(script, overrides_of):
    given = ["actor_rollout_ref.rollout.gpu_memory_utilization=0.1", "trainer.device=cpu"]
    assert overrides_of(script, *given)[-2:] == given


def sourced(**environment: str) -> dict[str, str]:
    """The environment behind env.sh, in a shell as strict as the scripts'."""
    command = f"set -euo pipefail; source {FOLDER / 'env.sh'}; env -0"
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
    check_npu_environment(environment, sleep_mode=True)
    assert environment.get("PYTORCH_NPU_ALLOC_CONF") == after
    assert "VLLM_PLUGINS" not in environment


def test_on_gpus_nothing_is_set_for_an_npu():
    environment = sourced(PLATFORM="cuda", PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True,max_split_size_mb:64")
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert not [name for name in environment if "ASCEND" in name or "NPU" in name or "HCCL" in name]


def test_an_unknown_platform_ends_a_script_with_what_to_use():
    done = subprocess.run(
        [SCRIPTS[0]], env={**os.environ, "PLATFORM": "tpu"}, timeout=30, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "PLATFORM=tpu: use npu or cuda" in done.stderr


def test_sourcing_it_leaves_a_shell_as_it_was():
    command = f"before=$-; source {FOLDER / 'env.sh'}; [ $before = $- ]"
    subprocess.run(["bash", "-c", command], check=True, timeout=30)
