"""The shell scripts of the examples parse, and the config accepts every key in them."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
# test_ascend950.py checks the others.
ON_A_CPU = [path for path in SCRIPTS if path.parent.name != "ascend950"]


def test_the_examples_have_scripts():
    assert {path.name for path in SCRIPTS} >= {"run.sh", "run_smollm2_135m_cpu.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_is_executable(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", ON_A_CPU, ids=lambda path: path.name)
def test_the_config_accepts_every_key(script, overrides_of):
    from verl.config import load_config

    config = load_config(overrides_of(script, "trainer.n_gpus_per_node=2", "trainer.default_local_dir=elsewhere"))
    assert config.algorithm.adv_estimator == ("gae" if script.parent.name == "ppo_trainer" else "grpo")
    assert config.trainer.n_gpus_per_node == 2  # arguments of the user override the script
    assert Path(config.trainer.default_local_dir).name == "elsewhere"
    assert config.actor_rollout_ref.rollout.dtype == "float32"
    assert config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0
    assert "file" in config.trainer.logger
