"""Reader of a run's directory in any state. Missing files become notes with the reason."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from verl.config.record import CHANGES_FILE, CONFIG_FILE, flat
from verl.utils.tracking import read_steps

METRICS_FILE = "metrics.jsonl"
# By kind of dump: the key that names its directory, and the default name.
DUMPS = {"validation": "trainer.validation_data_dir", "rollouts": "trainer.rollout_data_dir"}

Curve = tuple[list[int], list[float]]


@dataclass
class Run:
    """One run.

    Attributes:
        name: what it is called in figures; unlike any other in the report.
        directory: its `trainer.default_local_dir`.
        records: step to the metrics of that step, in order of steps.
        config: dotted key to value; empty if the run wrote none.
        changes: dotted key to `{"value", "default"}`; None if the run wrote none.
        dumps: for `validation` and `rollouts` the file of samples of each step.
        timeline: the trace of all processes, if there is one.
        silent_seconds: since the metrics were written last; None without metrics.
        notes: what is missing or damaged, and why it may be.
    """

    name: str
    directory: Path
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] | None = None
    dumps: dict[str, dict[int, Path]] = field(default_factory=dict)
    timeline: Path | None = None
    silent_seconds: float | None = None
    notes: list[str] = field(default_factory=list)

    def curve(self, metric: str) -> Curve:
        """Steps and values of a metric; NaN for values that the run recorded as not finite."""
        steps, values = [], []
        for step, data in self.records.items():
            if metric in data and (data[metric] is None or is_number(data[metric])):
                steps.append(step)
                values.append(math.nan if data[metric] is None else float(data[metric]))
        return steps, values

    def names(self) -> list[str]:
        """All metrics, in the order of their first record."""
        return list(dict.fromkeys(name for data in self.records.values() for name in data))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Read the runs in these directories. A repeated directory counts once.

    Raises:
        ValueError: a directory does not exist, or holds nothing of a run.
    """
    paths = list(dict.fromkeys(Path(directory).resolve() for directory in directories))
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct endings of the paths."""
    longest = max(len(path.parts) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path.parts[-length:]).replace("//", "/") for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def read_run(directory: Path, name: str) -> Run:
    """One run.

    Raises:
        ValueError: as `read_runs`.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give trainer.default_local_dir of a run")
    run = Run(name, directory)
    _read_config(run)
    _read_metrics(run)
    _find_dumps(run)
    _find_timeline(run)
    if not (run.records or run.config or any(run.dumps.values()) or (directory / METRICS_FILE).exists()):
        raise ValueError(
            f"{directory} contains neither {METRICS_FILE} nor {CONFIG_FILE}; give trainer.default_local_dir of a run"
        )
    return run


def _read_metrics(run: Run) -> None:
    path = run.directory / METRICS_FILE
    if not path.exists():
        logger = run.config.get("trainer.logger")
        if isinstance(logger, list) and "file" not in logger:
            why = "trainer.logger does not list 'file'"
        else:
            why = "the run has no record yet, or failed before the first one: see its output"
        run.notes.append(f"No {METRICS_FILE}, so there are no curves: {why}.")
        return
    records = read_steps(path)
    for record in records:
        data = record.get("data")
        run.records.setdefault(record["step"], {}).update(data if isinstance(data, dict) else {})
    run.records = dict(sorted(run.records.items()))
    run.silent_seconds = max(0.0, time.time() - path.stat().st_mtime)
    damaged = sum(1 for line in path.read_bytes().split(b"\n") if line.strip()) - len(records)
    if damaged:
        lines = "One line is" if damaged == 1 else f"{damaged} lines are"
        run.notes.append(f"{lines} damaged in {METRICS_FILE} and skipped: the run was writing, or was killed.")
    if not records:
        run.notes.append(f"{METRICS_FILE} has no record yet: the first step, or the validation before it, is running.")
    _note_bad_numbers(run)


def _note_bad_numbers(run: Run) -> None:
    """Add notes about values that are not finite, and about failed scorers."""
    bad: dict[str, int] = {}
    for step, data in run.records.items():
        for name in (name for name, value in data.items() if value is None):
            bad.setdefault(name, step)
    for name, step in list(bad.items())[:5]:
        run.notes.append(f"{name} is not a finite number in step {step}, and may be in others.")
    for metric, what in (("reward/num_errors", "raised an error"), ("reward/num_timeouts", "took too long")):
        if total := sum(value for value in run.curve(metric)[1] if math.isfinite(value)):
            run.notes.append(f"The reward function {what} for {total:.0f} samples.")


def _read_config(run: Run) -> None:
    values = _yaml(run, CONFIG_FILE)
    run.config = flat(values) if values else {}
    changes = _yaml(run, CHANGES_FILE)
    if changes is not None:
        run.changes = {str(key): entry for key, entry in changes.items() if isinstance(entry, dict)}


def _yaml(run: Run, name: str) -> dict[str, Any] | None:
    path = run.directory / name
    if not path.exists():
        run.notes.append(f"No {name}: an older version wrote the run, or the file was not copied.")
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError as error:
        run.notes.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        return None
    return values if isinstance(values, dict) else {}


def _find_dumps(run: Run) -> None:
    for kind, key in DUMPS.items():
        directory = _place(run, key, kind)
        found = {int(path.stem): path for path in directory.glob("*.jsonl") if path.stem.isdecimal()}
        # A directory may still hold the later steps of a longer run before this one.
        last = max(run.records, default=None)
        kept = {step: path for step, path in sorted(found.items()) if last is None or step <= last}
        run.dumps[kind] = kept
        if kept:
            continue
        if run.config and run.config.get(key) is None:
            why = f"{key} is null; with {key}=DIRECTORY the run stores them"
        else:
            why = f"{directory} has no file of a logged step"
        run.notes.append(f"No samples of {'the validation' if kind == 'validation' else 'the training'}: {why}.")


def _find_timeline(run: Run) -> None:
    path = _place(run, "trainer.timeline", "timeline.json")
    if path.is_file():
        run.timeline = path
    elif run.config and run.config.get("trainer.timeline") is None:
        run.notes.append("No timeline: trainer.timeline is null; with trainer.timeline=FILE the run writes one.")
    else:
        run.notes.append(f"No timeline: {path} does not exist.")


def _place(run: Run, key: str, usual: str) -> Path:
    """Return the configured path; inside the run's directory it is relative to it, because the run may have moved."""
    named, home = run.config.get(key), run.config.get("trainer.default_local_dir")
    if not isinstance(named, str):
        return run.directory / usual
    if isinstance(home, str) and Path(named).is_relative_to(home):
        return run.directory / Path(named).relative_to(home)
    return Path(named)
