"""Writes the table of docs/ascend_compatibility.md from the outcomes of the last complete `make contract`.

make contract contract-table
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]
sys.path += [str(REPOSITORY / "tests"), str(REPOSITORY / "benchmarks")]

from contract.vllm_ascend.build_env import RELEASES  # noqa: E402  (the path is set above)
from contract.vllm_ascend.features import FEATURES, Outcomes  # noqa: E402
from tables import markdown, write_section  # noqa: E402

DOCUMENT = REPOSITORY / "docs" / "ascend_compatibility.md"
SECTION = "contract"


def table(outcomes: Outcomes, releases: Iterable[str] = RELEASES) -> str:
    """Return the table and the reasons of skipped tests below it.

    A cell is "yes" if tests passed and none failed, and "-" if all were skipped; letters refer to the reasons.

    Raises:
        ValueError: a test failed, or a feature was not tested with a release.
    """
    releases, letters = list(releases), {}
    rows = []
    for feature, title in FEATURES.items():
        cells = []
        for release in releases:
            counts = outcomes.of(release, feature)
            if counts["failed"] or not (counts["passed"] or counts["skipped"]):
                problem = f"{counts['failed']} tests failed" if counts["failed"] else "no test ran"
                raise ValueError(f"{release}, {title!r}: {problem}; run `make contract` until all tests pass")
            marks = [letters.setdefault(reason, chr(ord("a") + len(letters))) for reason in counts["skipped"]]
            cell = f"yes, {counts['passed']}" if counts["passed"] else "-"
            cells.append(" ".join([cell, *(f"({mark})" for mark in sorted(set(marks)))]))
        rows.append([title, *cells])
    notes = "\n".join(f"- ({letter}) {reason}" for reason, letter in letters.items())
    return f"{markdown(['', *releases], rows)}\n\n{notes}\n"


def main() -> int:
    """Write the table; return 2, with one line on stderr, if results are missing."""
    try:
        write_section(DOCUMENT, SECTION, table(Outcomes.read(RELEASES)))
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"written: {DOCUMENT.relative_to(REPOSITORY)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
