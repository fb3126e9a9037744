"""Markdown tables of the benchmarks, with a line on the machine, written into the documents that quote them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import machine


def add_write_option(parser: argparse.ArgumentParser) -> None:
    """Add the option `--write DOCUMENT`."""
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="document to write the table into")


def caption(command: str) -> str:
    """Line above a table: command, date, machine, versions."""
    described = machine.describe()
    return (
        f"`{command}`; {described['date']}, {described['kind']} ({described['processor']}), {described['cores']}, "
        f"{described['versions']}."
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table with aligned columns."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write_section(document: Path, name: str, text: str) -> None:
    """Replace the text between `<!-- NAME -->` and `<!-- /NAME -->` in a document.

    Raises:
        ValueError: the document does not have these two markers.
    """
    content = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if begin not in content or end not in content:
        raise ValueError(f"{document}: the lines {begin.strip()} and {end} are missing: add them")
    head, rest = content.split(begin, 1)
    document.write_text(head + begin + text.strip() + "\n" + end + rest.split(end, 1)[1], encoding="utf-8")
