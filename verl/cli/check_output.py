"""What `verl check` prints: tables for people, plain values for machines."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from verl.cli.capture import Command

if TYPE_CHECKING:
    from verl.cli.check import Run

_WIDTH_OF_A_FILE = 400


def as_json(runs: Sequence[Run], others: Sequence[Command], bandwidth: float | None) -> dict[str, Any]:
    """Every training command's errors, warnings, notes and plan, and the programs that were not run."""
    return {
        "runs": [
            {
                "overrides": list(run.overrides),
                "errors": run.found.errors,
                "warnings": run.found.warnings,
                "notes": run.plan.notes if run.plan is not None else run.found.notes,
                "update_seconds": update_seconds(run, bandwidth),
                "plan": None if run.plan is None else dataclasses.asdict(run.plan),
            }
            for run in runs
        ],
        "not_run": [list(command.words) for command in others],
    }


def update_seconds(run: Run, bandwidth: float | None) -> float | None:
    """Seconds of a whole weight update at `bandwidth` x 10^9 bytes a second; None where either is not known."""
    if run.plan is None or run.plan.update_bytes is None or bandwidth is None:
        return None
    return run.plan.update_bytes / (bandwidth * 1e9)


def show(runs: Sequence[Run], others: Sequence[Command], bandwidth: float | None) -> None:
    """Print a table and lists for each training command."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Where lines go into a file, none is broken.
    console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)
    for number, run in enumerate(runs, start=1):
        title = "plan" if len(runs) == 1 else f"plan of training command {number}"
        if run.plan is not None:
            table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for label, text in _rows(run, bandwidth):
                table.add_row(label, Text(text))
            console.print(table)
        notes = run.plan.notes if run.plan is not None else run.found.notes
        kinds = (("note", "", notes), ("warning", "yellow", run.found.warnings), ("error", "red", run.found.errors))
        for kind, colour, texts in kinds:
            for text in texts:
                console.print(Text.assemble((f"{kind}: ", f"bold {colour}".strip()), text), soft_wrap=True)
    if others:
        names = dict.fromkeys(_name(command) for command in others)
        console.print(f"not run: {', '.join(names)}", soft_wrap=True, markup=False)
    errors = sum(len(run.found.errors) for run in runs)
    warnings = sum(len(run.found.warnings) for run in runs)
    console.print(f"{errors} error(s), {warnings} warning(s)", style="bold red" if errors else "bold green")


def _rows(run: Run, bandwidth: float | None) -> list[tuple[str, str]]:
    assert run.plan is not None
    seconds = update_seconds(run, bandwidth)
    rows = run.plan.rows()
    if seconds is not None:
        place = next(i for i, (label, _) in enumerate(rows) if label == "weight update") + 1
        rows.insert(place, ("", f"{seconds:.2g} s for all of it at {bandwidth:g} GB/s"))
    return rows


def _name(command: Command) -> str:
    words = command.words
    return " ".join(words[: 3 if words[1:2] == ("-m",) else 2])
