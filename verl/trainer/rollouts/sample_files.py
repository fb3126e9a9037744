"""JSON-lines files of generated samples, one per step: rollouts (`trainer.rollout_data_dir`) and validations
(`trainer.validation_data_dir`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.utils.atomic_io import atomic_write_text
from verl.utils.tracking.plain import to_json

SAMPLE_COLUMNS = ("input", "output", "gts", "score")


def dump_generations(directory: str | Path, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the samples of a step to DIRECTORY/STEP.jsonl, one JSON object per line, and return that path.

    Args:
        directory: created if missing.
        step: the training step; also stored in every line.
        rows: one mapping per sample with `input`, `output`, `gts` (ground truth), `score` and any further keys.

    Raises:
        ValueError: a row lacks one of these columns.
        OSError: the file cannot be written; an earlier file of that step is unharmed.
    """
    lines = []
    for number, row in enumerate(rows):
        if missing := [name for name in SAMPLE_COLUMNS if name not in row]:
            raise ValueError(f"rows[{number}] lacks {missing}; a sample needs {list(SAMPLE_COLUMNS)}")
        ordered = {**{name: row[name] for name in SAMPLE_COLUMNS}, "step": step}
        lines.append(to_json({**ordered, **{name: value for name, value in row.items() if name not in ordered}}))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{step}.jsonl"
    atomic_write_text(path, "".join(line + "\n" for line in lines))
    return path
