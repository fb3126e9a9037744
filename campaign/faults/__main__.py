"""`python -m campaign.faults`: faults in real runs, and the table of what followed.

The campaign is a sequence of runs. The settings and the faults of each depend on the seed and on its number only, so
that `--run` repeats it. The results go to a file, one line for each run, and the campaign continues after the last one
in it. Exit status: 1 if an invariant was violated.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from campaign import ROOT, jsonl
from campaign.faults import results
from campaign.faults.schedule import run_number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.run is not None:
        record = run_number(options.run, options.seed, options.folder)
        sys.stdout.write(f"{json.dumps(record, indent=1)}\n{results.summary([record])}\n")
        return int(results.violated([record]))
    file = options.results or ROOT / "build" / "campaign" / f"faults-seed{options.seed}.jsonl"
    records = jsonl.read(file)
    started = time.monotonic()
    while results.count(records) < options.faults and time.monotonic() - started < 60 * options.minutes:
        record = run_number(len(records), options.seed, options.folder)
        jsonl.append(file, record)
        records.append(record)
        sys.stdout.write(f"run {record['run']} of {record['settings']}\n{results.summary([record])}\n\n")
        sys.stdout.flush()
    sys.stdout.write(f"{results.summary(records)}\n")
    if options.write is not None:
        results.write(options.write, records, options.seed)
    return int(results.violated(records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m campaign.faults", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--faults", type=int, default=1000, help="end after this number of faults")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--run", type=int, metavar="NUMBER", help="repeat one run, without a record")
    parser.add_argument("--results", type=Path, metavar="FILE", help="default: build/campaign/faults-seedSEED.jsonl")
    parser.add_argument("--folder", type=Path, help="parent of the run directories; those with a violation stay there")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="document to write the table into")
    return parser


if __name__ == "__main__":
    sys.exit(main())
