"""The shell scripts of the examples: they parse, and every key in them is one that the config knows and accepts."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))


def overrides(script: Path, tmp_path: Path, *arguments: str) -> list[str]:
    """The arguments that the script hands to main_ppo, caught by a `python3` that only writes them down."""
    caught = tmp_path / "arguments"
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\nif [ "$2" = verl.trainer.main_ppo ]; then\n'
        f'shift 2; printf "%s\\0" "$@" > {shlex.quote(str(caught))}; fi\n'
    )
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    subprocess.run([script, *arguments], env=environment, cwd=tmp_path, check=True, timeout=30, capture_output=True)
    return caught.read_text().removesuffix("\0").split("\0")


def test_there_are_scripts():
    assert {path.name for path in SCRIPTS} >= {"run.sh", "run_smollm2_135m_cpu.sh"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_executable(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_config_takes_every_key(script, tmp_path):
    from verl.trainer.config import load_config

    config = load_config(
        overrides(script, tmp_path, "trainer.n_gpus_per_node=2", "trainer.default_local_dir=elsewhere")
    )
    assert config.algorithm.adv_estimator == ("gae" if script.parent.name == "ppo_trainer" else "grpo")
    assert config.trainer.n_gpus_per_node == 2  # what the user says comes last
    assert Path(config.trainer.default_local_dir).name == "elsewhere"
    assert config.actor_rollout_ref.rollout.dtype == "float32"
    assert config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0
    assert "file" in config.trainer.logger
