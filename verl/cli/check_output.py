"""Output of `verl check`: tables for people, one JSON object for programs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from verl.cli.capture import Command
from verl.preflight.findings import Findings
from verl.preflight.plan import Plan
from verl.utils.byte_size import GB

# Width of a table that is written into a file, so that no line is broken.
_FILE_WIDTH = 400


@dataclass(frozen=True)
class Run:
    """One training command and the result of its check.

    Attributes:
        overrides: arguments of the command.
        plan: None if errors prevent a plan.
        found: errors, warnings and notes.
    """

    overrides: tuple[str, ...]
    plan: Plan | None
    found: Findings


class RunJson(TypedDict):
    """JSON of one training command; `plan` holds the fields of `Plan`."""

    overrides: list[str]
    errors: list[str]
    warnings: list[str]
    notes: list[str]
    update_seconds: float | None
    plan: dict[str, Any] | None


class CheckJson(TypedDict):
    """JSON of `verl check`: `ok` without errors, and the words of each program that was not run."""

    ok: bool
    runs: list[RunJson]
    not_run: list[list[str]]


def is_ok(runs: Sequence[Run]) -> bool:
    """Return True if no run has errors."""
    return not any(run.found.errors for run in runs)


def as_json(runs: Sequence[Run], others: Sequence[Command], bandwidth: float | None) -> CheckJson:
    """Return the JSON object of all training commands.

    Args:
        others: programs that were not run.
        bandwidth: see `update_seconds`.
    """
    return {
        "ok": is_ok(runs),
        "runs": [
            {
                "overrides": list(run.overrides),
                "errors": run.found.errors,
                "warnings": run.found.warnings,
                "notes": run.found.notes,
                "update_seconds": update_seconds(run, bandwidth),
                "plan": None if run.plan is None else dataclasses.asdict(run.plan),
            }
            for run in runs
        ],
        "not_run": [list(command.words) for command in others],
    }


def update_seconds(run: Run, bandwidth: float | None) -> float | None:
    """Return the duration of a full weight update in seconds; None if its size or the bandwidth is not known.

    Args:
        bandwidth: in 10^9 bytes per second.
    """
    if run.plan is None or run.plan.update_bytes is None or bandwidth is None:
        return None
    return run.plan.update_bytes / (bandwidth * GB)


def show(runs: Sequence[Run], others: Sequence[Command], bandwidth: float | None) -> None:
    """Print a table and the findings of each training command, and the programs that were not run."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)
    for number, run in enumerate(runs, start=1):
        title = "plan" if len(runs) == 1 else f"plan of training command {number}"
        _show_run(console, run, title, bandwidth)
    if others:
        names = dict.fromkeys(_name(command) for command in others)
        console.print(f"not run: {', '.join(names)}", soft_wrap=True, markup=False)
    errors = sum(len(run.found.errors) for run in runs)
    warnings = sum(len(run.found.warnings) for run in runs)
    console.print(f"{errors} error(s), {warnings} warning(s)", style="bold red" if errors else "bold green")


def _show_run(console: Any, run: Run, title: str, bandwidth: float | None) -> None:
    from rich.table import Table
    from rich.text import Text

    if run.plan is not None:
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for label, text in _rows(run, run.plan, bandwidth):
            table.add_row(label, Text(text))
        console.print(table)
    kinds = (
        ("note", "", run.found.notes),
        ("warning", "yellow", run.found.warnings),
        ("error", "red", run.found.errors),
    )
    for kind, color, texts in kinds:
        for text in texts:
            console.print(Text.assemble((f"{kind}: ", f"bold {color}".strip()), text), soft_wrap=True)


def _rows(run: Run, plan: Plan, bandwidth: float | None) -> list[tuple[str, str]]:
    """Return the rows of the plan, with the duration of a weight update behind its size."""
    seconds, rows = update_seconds(run, bandwidth), plan.rows()
    if seconds is not None:
        index = next(i for i, (label, _) in enumerate(rows) if label == "weight update") + 1
        rows.insert(index, ("", f"full update: {seconds:.2g} s at {bandwidth:g} GB/s"))
    return rows


def _name(command: Command) -> str:
    words = command.words
    return " ".join(words[: 3 if words[1:2] == ("-m",) else 2])
