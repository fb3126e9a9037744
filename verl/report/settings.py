"""Tables of what runs were set to: what differs from the defaults, and from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from verl.report.run import Run
from verl.report.samples import visible

NOT_KNOWN = "not known"


@dataclass(frozen=True)
class Row:
    """A key, its default, its value in each run, and whether these differ."""

    key: str
    default: str
    values: list[str]
    differs: bool


def rows(runs: Sequence[Run]) -> list[Row]:
    """Every key that some run changed or that differs between runs; those that differ first."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.changes or {})
    keys |= dict.fromkeys(key for run in known for key in run.config if _differs(key, known))
    made = [_row(key, runs, known) for key in keys]
    return sorted(made, key=lambda row: not row.differs)


def whole(run: Run) -> str:
    """Every key as YAML, by dotted names."""
    return visible(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=120), 200_000)


def _differs(key: str, known: Sequence[Run]) -> bool:
    return any(run.config.get(key) != known[0].config.get(key) for run in known)


def _row(key: str, runs: Sequence[Run], known: Sequence[Run]) -> Row:
    entry: dict[str, Any] | None = next((run.changes[key] for run in runs if run.changes and key in run.changes), None)
    # A key that no run changed has its default everywhere that it exists.
    default = show(entry.get("default")) if entry else NOT_KNOWN
    values = [show(run.config.get(key)) if run.config else NOT_KNOWN for run in runs]
    return Row(visible(key, 200), default, values, _differs(key, known))


def show(value: Any) -> str:
    """As it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "True", False: "False"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return visible(str(value), 300)
