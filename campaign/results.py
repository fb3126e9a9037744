"""Results of a campaign: one JSON object for each case, and the table of the document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from campaign import jsonl
from campaign.verdict import ACCEPTED, REFUSED, VIOLATION


@dataclass(frozen=True)
class Result:
    """The result of one case.

    Attributes:
        case: its name.
        area: row of the table.
        kind: `refused`, `accepted` or `violation`.
        violations: what is wrong.
        seconds: duration.
        said: last line of the output.
    """

    case: str
    area: str
    kind: str
    violations: tuple[str, ...]
    seconds: float
    said: str


def append(path: Path, result: Result) -> None:
    """Add a result to the file."""
    jsonl.append(path, asdict(result))


def read(path: Path) -> dict[str, Result]:
    """Return the last result of each case."""
    return {
        fields["case"]: Result(**fields | {"violations": tuple(fields["violations"])}) for fields in jsonl.read(path)
    }


def rows(results: Iterable[Result]) -> list[list[str]]:
    """Return the rows of the table: area, cases, refused, accepted, violations, longest case."""
    areas: dict[str, list[Result]] = {}
    for result in results:
        areas.setdefault(result.area, []).append(result)
    table = [_row(area, of_area) for area, of_area in sorted(areas.items())]
    return [*table, _row("all", [result for of_area in areas.values() for result in of_area])]


HEAD = ("input", "cases", "refused", "accepted", "violations", "slowest case")


def _row(area: str, results: Sequence[Result]) -> list[str]:
    counts = [sum(result.kind == kind for result in results) for kind in (REFUSED, ACCEPTED, VIOLATION)]
    slowest = max((result.seconds for result in results), default=0.0)
    return [area, str(len(results)), *map(str, counts), f"{slowest:.1f} s"]
