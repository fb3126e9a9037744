"""Runs started from the command line, as users do, on models with random weights and the task of `task.py`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import task

from verl.utils.tracking import read_steps

HERE = Path(__file__).resolve().parent
Keys = dict[str, Any]


@dataclass(frozen=True)
class Load:
    """Work of one step.

    Attributes:
        prompts: prompts per step.
        n: samples per prompt.
        shortest, longest: tokens of a response; the response lengths of the prompts are evenly spaced between them.
        updates: optimizer steps.
        micro_batch: samples of the longest length per forward and backward pass.
        prompt: tokens per prompt.
    """

    prompts: int
    n: int
    shortest: int
    longest: int
    updates: int
    micro_batch: int
    prompt: int = 8

    @property
    def samples(self) -> int:
        return self.prompts * self.n

    @property
    def lengths(self) -> list[int]:
        """Tokens of a response, for each prompt of a step."""
        return task.spread(self.prompts, self.shortest, self.longest)

    @property
    def tokens(self) -> int:
        """Tokens generated in a step."""
        return sum(self.lengths) * self.n

    def texts(self, steps: int = 16) -> list[str]:
        """Prompts of `steps` steps."""
        return task.make_prompts(steps, self.lengths, self.prompt)

    def scaled(self, prompts: int | None) -> Load:
        """Return the load with another number of prompts; unchanged for None."""
        return self if prompts is None else replace(self, prompts=prompts)

    def to_json(self) -> str:
        """Return the load and its prompts as JSON, for a process without verl."""
        return json.dumps({**asdict(self), "texts": self.texts()})


def write_rows(load: Load, path: Path) -> Path:
    """Write the prompts of a load to a parquet file and return its path."""
    rows = [
        {
            "data_source": "benchmark",
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"style": "rule", "ground_truth": ""},
        }
        for text in load.texts()
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def keys(load: Load, model_dir: Path, directory: Path, steps: int, overrides: Mapping[str, Any] = {}) -> Keys:
    """Return the config of a run: float32, no gradient checkpointing, no validation, no checkpoint, metrics in a file.

    Writes the data and the agent loop's config file into `directory`; the run writes its metrics there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    loops = directory / "loops.yaml"
    loops.write_text(f"- name: benchmark\n  _target_: {HERE / 'task_loop.py'}:TaskLoop\n")
    rows = write_rows(load, directory / "rows.parquet")
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return {
        "algorithm.adv_estimator": "grpo",
        "data.train_files": rows,
        "data.val_files": rows,
        "data.train_batch_size": load.prompts,
        "data.max_prompt_length": load.prompt,
        "data.max_response_length": load.longest,
        "data.shuffle": False,
        "reward.custom_reward_function.path": HERE / "task.py",
        "reward.num_workers": 1,
        "actor_rollout_ref.model.path": model_dir,
        "actor_rollout_ref.model.enable_gradient_checkpointing": False,
        f"{actor}.ppo_mini_batch_size": load.prompts // load.updates,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": load.micro_batch * (load.prompt + load.longest),
        f"{actor}.optim.lr": 1e-6,
        f"{actor}.fsdp_config.dtype": "float32",
        f"{rollout}.dtype": "float32",
        f"{rollout}.n": load.n,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.enforce_eager": True,
        f"{rollout}.max_num_seqs": min(load.samples, 512),
        f"{rollout}.agent.agent_loop_config_path": loops,
        f"{rollout}.agent.default_agent_loop": "benchmark",
        f"{rollout}.checkpoint_engine.update_weights_bucket_megabytes": 128,
        "trainer.device": "cpu",
        "trainer.n_gpus_per_node": 1,
        "trainer.total_training_steps": steps,
        "trainer.total_epochs": 1000,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "disable",
        "trainer.logger": "[file]",
        "trainer.default_local_dir": directory,
        **overrides,
    }


def overrides_of(config: Mapping[str, Any]) -> list[str]:
    """Return the config as command-line overrides."""
    return [f"{key}={value}" for key, value in config.items()]


def command(config: Mapping[str, Any]) -> list[str]:
    """Return the command line of a run."""
    return [sys.executable, "-m", "verl.trainer.main_ppo", *overrides_of(config)]


def environment() -> dict[str, str]:
    """Return the environment variables with which a run finds the modules of this directory."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def start(config: Mapping[str, Any]) -> subprocess.Popen:
    """Start a run; its output goes to log.txt beside its metrics."""
    with log_of(config).open("w") as log:
        return subprocess.Popen(
            command(config),
            env={**os.environ, **environment()},
            cwd=HERE.parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen, config: Mapping[str, Any]) -> list[dict[str, float]]:
    """Wait for the end of a run and return the metrics of its steps.

    Raises:
        RuntimeError: the run failed; the text has the end of its output.
    """
    try:
        status = process.wait()
    finally:
        # If the benchmark is interrupted, end its run too.
        process.terminate()
        process.wait()
    if status:
        log = log_of(config)
        raise RuntimeError(f"the run of {log.parent.name} ended with status {status}:\n{log.read_text()[-4000:]}")
    return metrics(config)


def log_of(config: Mapping[str, Any]) -> Path:
    return Path(config["trainer.default_local_dir"]) / "log.txt"


def metrics(config: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the metrics of the steps that a run has completed so far."""
    path = Path(config["trainer.default_local_dir"]) / "metrics.jsonl"
    return [record["data"] for record in read_steps(path) if record["step"] > 0]


def median(steps: list[dict[str, float]], name: str) -> float:
    """Return the median of a metric over the steps that have it; 0 if none has it."""
    return statistics.median([step[name] for step in steps if name in step] or [0.0])
