"""Best and worst samples of the newest dump."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl.report.run import Run, is_number, read_rows
from verl.report.style import number
from verl.report.text import visible

TITLES = {"validation": "Validation", "rollouts": "Training"}
_COLUMNS = ("input", "output", "gts", "score", "step", "uid")
_EACH = 4
_MORE = 40


@dataclass(frozen=True)
class Sample:
    """One sample on the page. `more` holds further numbers and texts of the scorer."""

    score: str
    prompt: str
    response: str
    truth: str
    more: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Samples:
    """Samples of one step.

    Attributes:
        title: validation or training.
        step: the step.
        count: samples in the dump with a score.
        mean: of their scores.
        best, worst: highest and lowest score first, each prompt once.
    """

    title: str
    step: int
    count: int
    mean: str
    best: list[Sample]
    worst: list[Sample]


def read_samples(run: Run) -> list[Samples]:
    """Return samples of the newest dump of each kind. A dump without samples becomes a note of the run."""
    found = []
    for kind, title in TITLES.items():
        if not run.dumps.get(kind):
            continue
        step, path = list(run.dumps[kind].items())[-1]
        rows = [row for row in read_rows(run, path) if is_number(row.get("score"))]
        if not rows:
            run.notes.append(
                f"{path.name} of the {title.lower()} samples has no sample with a score: is the run writing it?"
            )
            continue
        mean = number(sum(row["score"] for row in rows) / len(rows))
        worst = sorted(rows, key=lambda row: row["score"])
        found.append(Samples(title, step, len(rows), mean, _first(worst[::-1]), _first(worst)))
    return found


def _first(rows: list[dict[str, Any]]) -> list[Sample]:
    """Return the first sample of each prompt, at most `_EACH`.

    A prompt is a row of the data; files of older versions lack its `uid`.
    """
    of_prompt: dict[str, dict[str, Any]] = {}
    for row in rows:
        of_prompt.setdefault(str(row["uid"] if "uid" in row else (row.get("input"), row.get("gts"))), row)
    return [_sample(row) for row in list(of_prompt.values())[:_EACH]]


def _sample(row: Mapping[str, Any]) -> Sample:
    more = [
        (visible(name, 80), number(value) if is_number(value) else visible(str(value), 200))
        for name, value in row.items()
        if name not in _COLUMNS and value is not None
    ]
    return Sample(
        number(row["score"]),
        visible(str(row.get("input", ""))),
        visible(str(row.get("output", ""))),
        visible(str(row.get("gts", ""))),
        tuple(more[:_MORE]),
    )
