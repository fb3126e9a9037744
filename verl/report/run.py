"""Reader of a run's directory in any state. Missing and damaged files become notes with the reason.

Every value in a `Run` is plain and bounded (`verl.utils.plain_data`), and its text holds no control character. A number
counts only if `is_number` accepts it, so sums, axes and formats cannot overflow.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from verl.config.record import CHANGES_FILE, CONFIG_FILE, flat
from verl.report.style import number
from verl.report.text import visible, visible_value
from verl.utils.plain_data import parse_yaml
from verl.utils.text import without_controls
from verl.utils.tracking.jsonl import MAX_STEP, METRICS_FILE, read_steps

# By kind of dump: the key that names its directory, and the default name.
DUMPS = {"validation": "trainer.validation_data_dir", "rollouts": "trainer.rollout_data_dir"}

# Figures of larger numbers overflow, and smaller ones are drawn as 0.
_LARGEST, _SMALLEST = 1e100, 1e-100
# A config has a few hundred keys; parsing YAML takes about a second for each MiB.
_MAX_YAML_BYTES = 4 * 2**20
_NOTE_CHARACTERS = 500

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
        """Steps and values of a metric; NaN for values that are no finite number."""
        steps = [step for step, data in self.records.items() if metric in data]
        return steps, [as_float(self.records[step][metric]) for step in steps]

    def names(self) -> list[str]:
        """All metrics, in the order of their first record."""
        return list(dict.fromkeys(name for data in self.records.values() for name in data))


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return True for a finite number that a figure can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def as_float(value: Any) -> float:
    """Return a number of a run for a figure; NaN if it is none."""
    if not is_number(value):
        return math.nan
    return float(value) if abs(value) >= _SMALLEST else 0.0


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
    run = Run(without_controls(name), directory)
    _read_config(run)
    _read_metrics(run)
    _find_dumps(run)
    _find_timeline(run)
    if not (run.records or run.config or any(run.dumps.values()) or os.path.lexists(directory / METRICS_FILE)):
        raise ValueError(
            f"{directory} contains neither {METRICS_FILE} nor {CONFIG_FILE}; give trainer.default_local_dir of a run"
        )
    return run


def read_rows(run: Run, path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of JSON lines, `{"step": int, ...}`; unusable lines become a note."""
    try:
        records = visible_value(read_steps(path))
        lines = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    except OSError as error:
        run.notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return []
    _note_damaged_lines(run, path.name, lines - len(records))
    return records


def _note_damaged_lines(run: Run, name: str, count: int) -> None:
    if count > 0:
        lines = "One line is" if count == 1 else f"{count} lines are"
        run.notes.append(f"{lines} damaged in {name} and skipped: the run was writing, or was killed.")


def _read_metrics(run: Run) -> None:
    path = run.directory / METRICS_FILE
    if not os.path.isfile(path):
        logger = run.config.get("trainer.logger")
        if os.path.lexists(path):
            why = "this path is no file"
        elif isinstance(logger, list) and "file" not in logger:
            why = "trainer.logger does not list 'file'"
        else:
            why = "the run has no record yet, or failed before the first one: see its output"
        run.notes.append(f"No {METRICS_FILE}, so there are no curves: {why}.")
        return
    rows = read_rows(run, path)
    records = [record for record in rows if isinstance(record.get("data"), dict)]
    _note_damaged_lines(run, METRICS_FILE, len(rows) - len(records))
    for record in records:
        run.records.setdefault(record["step"], {}).update(record["data"])
    run.records = dict(sorted(run.records.items()))
    run.silent_seconds = max(0.0, time.time() - path.stat().st_mtime)
    if not records:
        run.notes.append(f"{METRICS_FILE} has no record yet: the first step, or the validation before it, is running.")
    _note_bad_numbers(run)


def _note_bad_numbers(run: Run) -> None:
    """Add notes about values that are not finite, and about failed scorers."""
    bad: dict[str, int] = {}
    numeric = {name for data in run.records.values() for name, value in data.items() if _is_numeric(value)}
    for step, data in run.records.items():
        for name in (name for name, value in data.items() if name in numeric and not is_number(value)):
            bad.setdefault(name, step)
    for name, step in list(bad.items())[:5]:
        run.notes.append(f"{name} is not a finite number in step {step}, and may be in others.")
    for metric, what in (("reward/num_errors", "raised an error"), ("reward/num_timeouts", "took too long")):
        if total := sum(value for value in run.curve(metric)[1] if math.isfinite(value)):
            run.notes.append(f"The reward function {what} for {number(total)} samples.")


def _is_numeric(value: Any) -> bool:
    """Return True if a metric with this value should have numbers; None stands for a number that is not finite."""
    return value is None or isinstance(value, float) or is_number(value)


def _read_config(run: Run) -> None:
    values = _yaml(run, CONFIG_FILE)
    run.config = flat(values) if values else {}
    if os.path.lexists(earlier := run.directory / f"{CONFIG_FILE}.previous"):
        run.notes.append(
            f"The run was resumed with another config, which may explain a change in its curves: see {earlier.name}."
        )
    changes = _yaml(run, CHANGES_FILE)
    if changes is not None:
        run.changes = {key: entry for key, entry in changes.items() if isinstance(entry, dict)}


def _yaml(run: Run, name: str) -> dict[str, Any] | None:
    path = run.directory / name
    if not os.path.lexists(path):
        run.notes.append(f"No {name}: an older version wrote the run, or the file was not copied.")
        return None
    try:
        if not path.is_file():
            raise ValueError("it is not a file")
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ValueError(f"it has more than {_MAX_YAML_BYTES >> 20} MiB")
        values = parse_yaml(path.read_text(encoding="utf-8", errors="replace"))
        if not isinstance(values, dict):
            raise ValueError("it contains no keys")
    except (OSError, ValueError) as error:
        run.notes.append(visible(f"{name} cannot be read: {error}", _NOTE_CHARACTERS))
        return None
    return visible_value(values)


def _find_dumps(run: Run) -> None:
    for kind, key in DUMPS.items():
        directory = _place(run, key, kind)
        # A directory may still hold the later steps of a longer run before this one.
        last = max(run.records, default=MAX_STEP)
        run.dumps[kind] = kept = {step: path for step, path in _numbered_files(directory) if step <= last}
        if kept:
            continue
        if run.config and run.config.get(key) is None:
            why = f"{key} is null; with {key}=DIRECTORY the run stores them"
        else:
            why = f"{directory} has no file of a logged step"
        run.notes.append(f"No samples of {'the validation' if kind == 'validation' else 'the training'}: {why}.")


def _numbered_files(directory: Path) -> list[tuple[int, Path]]:
    """Return the files `STEP.jsonl` of a directory in order of their steps; none of a directory that is unreadable."""
    # Unlike Path's methods, os.path's also return False for names that no file can have.
    if not os.path.isdir(directory):
        return []
    found = [(int(path.stem), path) for path in directory.glob("*.jsonl") if path.stem.isdecimal()]
    return sorted((step, path) for step, path in found if step <= MAX_STEP and os.path.isfile(path))


def _find_timeline(run: Run) -> None:
    path = _place(run, "trainer.timeline", "timeline.json")
    if os.path.isfile(path):
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
