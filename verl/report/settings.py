"""Tables of settings: differences from the defaults, and between runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from verl.report.run import Run
from verl.report.text import visible

NOT_KNOWN = "not known"


@dataclass(frozen=True)
class Row:
    """A key, its default, its value in each run, and whether the values differ."""

    key: str
    default: str
    values: list[str]
    differs: bool


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return every key that a run changed or that differs between runs; different ones first."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.changes or {})
    keys |= dict.fromkeys(key for run in known for key in run.config if _differs(key, known))
    made = [_row(key, runs, known) for key in keys]
    return sorted(made, key=lambda row: not row.differs)


def whole(run: Run) -> str:
    """Return every key as YAML, with dotted names."""
    return visible(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=120), 200_000)


def _differs(key: str, known: Sequence[Run]) -> bool:
    # NaN differs from itself.
    first = known[0].config.get(key)
    return any(value != first and repr(value) != repr(first) for value in (run.config.get(key) for run in known))


def _row(key: str, runs: Sequence[Run], known: Sequence[Run]) -> Row:
    entry: dict[str, Any] | None = next((run.changes[key] for run in runs if run.changes and key in run.changes), None)
    # A key that no run changed has its default in every run.
    default = show(entry.get("default")) if entry else NOT_KNOWN
    values = [show(run.config.get(key)) if run.config else NOT_KNOWN for run in runs]
    return Row(visible(key, 200), default, values, _differs(key, known))


def show(value: Any) -> str:
    """Return a value as written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "True", False: "False"}[value]
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, list):
        return visible("[" + ", ".join(show(item) for item in value) + "]", 300)
    return visible(str(value), 300)
