"""Runs of the quickstart with other keys, for the benchmarks that compare algorithms on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl.utils.tracking import read_steps

ROOT = Path(__file__).resolve().parents[1]
_VALIDATION = "reasoning_gym/spell_backward/reward/mean@4"


def run(directory: Path, overrides: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Run `examples/quickstart/run.sh` into `directory`; the metrics by step. Its output is in `directory`/log.txt.

    Raises:
        RuntimeError: the run failed; with the end of its output.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    keys = {"trainer.default_local_dir": directory, "trainer.save_freq": -1, "trainer.logger": "[file]", **overrides}
    with log.open("w") as output:
        status = subprocess.run(
            [ROOT / "examples/quickstart/run.sh", *(f"{key}={value}" for key, value in keys.items())],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            check=False,
        ).returncode
    if status:
        raise RuntimeError(f"the run in {directory} ended with status {status}:\n{log.read_text()[-3000:]}")
    return {record["step"]: record["data"] for record in read_steps(directory / "metrics.jsonl")}


def validation(steps: dict[int, dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, mean reward on held-out words); which group it is in depends on what else the scorer returns."""
    return series(steps, f"val-aux/{_VALIDATION}") or series(steps, f"val-core/{_VALIDATION}")


def series(steps: dict[int, dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    return [(step, data[name]) for step, data in sorted(steps.items()) if name in data]
