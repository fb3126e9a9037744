"""The real command line, in processes of its own."""

import os
import subprocess
import sys

import pytest


def command(tmp_path, *arguments):
    here = tmp_path / "here"
    here.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *map(str, arguments)],
        cwd=here,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr
    # Hydra would leave directories and log files where it is started.
    assert list(here.iterdir()) == []
    return done


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.total_epoch=1", ("trainer.total_epoch", "did you mean trainer.total_epochs?")),
        ("trainer.total_epochs=abc", ("trainer.total_epochs=abc", "whole number")),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=3", ("ppo_mini_batch_size=3", "use 2 or 4")),
    ],
)
def test_a_wrong_config_ends_with_status_2_and_the_reason(tmp_path, run_files, override, words):
    done = command(tmp_path, *run_files.overrides(), override)
    assert done.returncode == 2
    assert done.stdout == "" and all(word in done.stderr for word in words), done.stderr


def test_a_config_file_in_the_working_directory_s_neighbour(tmp_path, run_files):
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\ndata: {train_batch_size: 6}\n")
    options = ("--config-path", "../conf", "--config-name=mine")
    done = command(tmp_path, *options, *run_files.overrides(data__train_batch_size=None))
    assert done.returncode == 2 and "does not divide data.train_batch_size=6" in done.stderr
    done = command(tmp_path, *options, "--cfg", "job", "data.seed=4", "+reward.reward_kwargs.a=1")
    assert done.returncode == 0
    assert "train_batch_size: 6" in done.stdout and "seed: 4" in done.stdout and "a: 1" in done.stdout


def test_a_config_file_that_is_not_there(tmp_path):
    done = command(tmp_path, "--config-name", "nothing")
    assert done.returncode == 2 and "nothing" in done.stderr


def test_importing_and_checking_needs_no_torch_no_ray_and_no_vllm(run_files):
    code = (
        "import sys; from verl.config import load_config; from verl.preflight import check; "
        "check(load_config(sys.argv[1:])); "
        "import verl.utils.devices, verl.trainer.main_ppo; "
        "print([m for m in ('torch', 'ray', 'vllm', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *run_files.overrides()], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() in ("[]", "['numpy']")  # pyarrow imports NumPy where it is installed
