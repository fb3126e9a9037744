"""Counts of what followed the faults, as text and as the table of the document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tables

Record = dict[str, Any]


def counts(records: Iterable[Record]) -> list[tuple[str, int, int, int, int]]:
    """Return for each kind of process: faults that took place, survived ones, ends, and violated invariants."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        for fault in record["faults"]:
            count = found.setdefault(fault["target"], Counter())
            count["violations"] += len(fault["violations"])
            if fault["outcome"] != "not reached":
                count["faults"] += 1
                count[fault["outcome"]] += 1
    return [
        (target, count["faults"], count["survived"], count["ended"], count["violations"])
        for target, count in sorted(found.items())
    ]


def count(records: Iterable[Record]) -> int:
    """Return the number of faults that took place."""
    return sum(row[1] for row in counts(records))


def violated(records: Iterable[Record]) -> bool:
    """Return whether an invariant was violated."""
    return any(record["violations"] or any(fault["violations"] for fault in record["faults"]) for record in records)


def summary(records: Sequence[Record]) -> str:
    """Return counts and violations as lines of text."""
    lines = [f"{'struck':16}{'faults':>8}{'survived':>10}{'ended':>8}{'violations':>12}"]
    lines += [f"{target:16}{a:8}{b:10}{c:8}{d:12}" for target, a, b, c, d in counts(records)]
    for record in records:
        where = f"run {record['run']} in {record['directory']}"
        lines += [f"{where}: {problem}" for problem in record["violations"]]
        for fault in record["faults"]:
            lines += [f"{where}, {fault['fault']}, step {fault['step']}: {text}" for text in fault["violations"]]
    return "\n".join([*lines, _total(records)])


def write(document: Path, records: Sequence[Record], seed: int) -> None:
    """Write the table into the section `faults` of a document."""
    head = ("struck", "faults", "the run went on", "the run ended, and resumed", "invariants violated")
    rows = [[target, *map(str, numbers)] for target, *numbers in counts(records)]
    of_runs = sum(len(record["violations"]) for record in records)
    text = f"{_total(records)}. Invariants that a run as a whole violated: {of_runs}."
    command = f"make campaign ARGS=--seed={seed}"
    tables.write_section(document, "faults", f"{tables.caption(command)}\n\n{tables.markdown(head, rows)}\n\n{text}")


def _total(records: Sequence[Record]) -> str:
    hours = sum(record["seconds"] for record in records) / 3600
    return f"{count(records)} faults in {len(records)} runs, {hours:.1f} hours"
