"""Best and worst samples of the newest dump."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.report.run import Run, is_number
from verl.report.style import number
from verl.utils.tracking import read_steps

TITLES = {"validation": "Validation", "rollouts": "Training"}
_COLUMNS = ("input", "output", "gts", "score", "step", "uid")
_EACH = 4
_CHARACTERS = 4000


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
        rows = scored_rows(path)
        if not rows:
            run.notes.append(
                f"{path.name} of the {title.lower()} samples has no sample with a score: is the run writing it?"
            )
            continue
        mean = number(sum(row["score"] for row in rows) / len(rows))
        worst = sorted(rows, key=lambda row: row["score"])
        found.append(Samples(title, step, len(rows), mean, _first(worst[::-1]), _first(worst)))
    return found


def scored_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a dump with a numeric score, in order."""
    return [row for row in read_steps(path) if is_number(row.get("score"))]


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
        (str(name), number(value) if is_number(value) else visible(str(value), 200))
        for name, value in row.items()
        if name not in _COLUMNS and value is not None
    ]
    return Sample(
        number(row["score"]),
        visible(str(row.get("input", ""))),
        visible(str(row.get("output", ""))),
        visible(str(row.get("gts", ""))),
        tuple(more),
    )


def visible(text: str, characters: int = _CHARACTERS) -> str:
    """Return text for the page: truncated, control characters as symbols, no broken characters."""
    rest = len(text) - characters
    text = text if rest <= 0 else f"{text[:characters]} … {rest:,} more characters"
    text = "".join(chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text)
    return text.encode("utf-8", "replace").decode()
