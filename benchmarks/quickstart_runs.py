"""Runs of the quickstart with other keys, for benchmarks that compare algorithms."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from verl.utils.tracking import read_steps

ROOT = Path(__file__).resolve().parents[1]
_VALIDATION = "reasoning_gym/spell_backward/reward/mean@4"


def run(directory: Path, overrides: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Run `examples/quickstart/run.sh` into `directory` and return its metrics by step; log.txt there has its output.

    Raises:
        RuntimeError: the run failed; the text has the end of its output.
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
    return steps_of(directory)


def run_once(directory: Path, overrides: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the metrics by step of the run that an earlier call finished in `directory`; otherwise run it.

    A run has this name only when it is finished, so what remains of a stopped one is done again.
    """
    if not directory.exists():
        part = directory.with_name(f"{directory.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        run(part, overrides)
        part.rename(directory)
    return steps_of(directory)


def steps_of(directory: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics by step of a run."""
    return {record["step"]: record["data"] for record in read_steps(directory / "metrics.jsonl")}


def validation(steps: dict[int, dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, mean reward on held-out words); the scorer's other values determine the metric's prefix."""
    return series(steps, f"val-aux/{_VALIDATION}") or series(steps, f"val-core/{_VALIDATION}")


def series(steps: dict[int, dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return (step, value) of a metric."""
    return [(step, data[name]) for step, data in sorted(steps.items()) if name in data]
