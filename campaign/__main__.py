"""`python -m campaign input`: give verl bad input of every kind, and report what breaks the rule.

Each case must end in an error that names the field and the value, or the file, without a traceback, without a changed
file and within a time limit; or its input is accepted and legal. The results are appended to a file, so that an
interrupted campaign continues. Exit status: 1 with violations.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from campaign import ROOT, config_keys, files, results
from campaign.cases import Case, select
from campaign.results import Result
from campaign.run import run
from campaign.verdict import VIOLATION


def all_cases(seed: int, per_key: int) -> list[Case]:
    """Return the cases of a campaign: first those that must be accepted, then all areas in turn."""
    cases = [*files.cases(seed), *config_keys.cases(seed, per_key)]
    random.Random(seed).shuffle(cases)
    return sorted(cases, key=lambda case: not case.must_accept)


def repeat(seed: int, name: str) -> str:
    """Return the command that repeats one case."""
    return f"python -m campaign input --seed {seed} --only {shlex.quote(name)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    seed = options.seed
    try:
        if options.only:
            cases = select([*files.cases(seed), *config_keys.all_cases(seed)], options.only)
        else:
            cases = all_cases(seed, options.per_key)[: options.cases]
    except ValueError as error:
        sys.stderr.write(f"campaign: {error}\n")
        return 2
    if options.list:
        sys.stdout.write("".join(f"{case.name}\n" for case in cases))
        return 0
    file = options.results or ROOT / "build" / "campaign" / f"input-seed{seed}.jsonl"
    if options.restart:
        file.unlink(missing_ok=True)
    known = {} if options.only else results.read(file)
    missing = [case for case in cases if case.name not in known or known[case.name].kind == VIOLATION]
    found = {case.name: known[case.name] for case in cases if case.name in known}
    for done, (result, ended) in enumerate(run(missing, seed, workers=options.workers), 1):
        found[result.case] = result
        if options.only:
            sys.stdout.write(f"{result.case}: exit status {ended.status}, {ended.seconds:.1f} s\n{ended.output}\n")
        else:
            results.append(file, result)
        if result.kind == VIOLATION or options.only:
            sys.stdout.write(f"{result.kind}: {result.case}: {'; '.join(result.violations)}\n")
        if done % 200 == 0:
            sys.stderr.write(f"{done} of {len(missing)} cases\n")
        sys.stdout.flush()
    violations = [result for result in found.values() if result.kind == VIOLATION]
    _report(list(found.values()), violations, options)
    return 1 if violations else 0


def _report(found: Sequence[Result], violations: Sequence[Result], options: argparse.Namespace) -> None:
    import tables

    table = tables.markdown(results.HEAD, results.rows(found))
    sys.stdout.write(f"\n{table}\n")
    lines = [f"- {'; '.join(result.violations)}: `{repeat(options.seed, result.case)}`" for result in violations]
    if lines:
        sys.stdout.write("\nviolations:\n" + "\n".join(lines) + "\n")
    if options.write is not None and not options.only:
        part = "" if options.cases is None else f" --cases {options.cases}"
        caption = tables.caption(f'make campaign-input ARGS="--seed {options.seed}{part}"')
        shown = "\n".join(["", "Violations:", "", *lines]) if lines else ""
        tables.write_section(options.write, "bad-input", f"{caption}\n\n{table}\n{shown}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m campaign", description=(__doc__ or "").partition("\n\n")[2])
    campaigns = parser.add_subparsers(metavar="CAMPAIGN", required=True)
    options = campaigns.add_parser("input", help="bad input")
    options.add_argument("--seed", type=int, default=1, help="decides values, damaged bytes and chosen values of a key")
    options.add_argument("--only", action="append", metavar="CASE", help="run this case, or those below this name")
    options.add_argument("--list", action="store_true", help="print the names of the cases")
    options.add_argument(
        "--per-key", type=int, default=config_keys.PER_KEY, metavar="N", help="values for each config key"
    )
    options.add_argument("--cases", type=int, metavar="N", help="run only N cases of all areas")
    options.add_argument("--workers", type=int, default=2, help="cases that run at a time")
    options.add_argument("--results", type=Path, help="file of the results; default: in build/campaign")
    options.add_argument("--restart", action="store_true", help="forget the results of an interrupted campaign")
    options.add_argument("--write", type=Path, metavar="DOCUMENT", help="document to write the table into")
    return parser


if __name__ == "__main__":
    sys.exit(main())
