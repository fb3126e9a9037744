"""Run cases, each in a copy of the same directory and in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from campaign import sandbox
from campaign.cases import Case
from campaign.child import Child, Ended
from campaign.results import Result
from campaign.verdict import judge

SECONDS, PROCESSOR_SECONDS = 600.0, 60
"""Limits of a case: time on a machine with any load, and processor time."""

Command = Callable[[Case, Path], Callable[[], int]]
"""Returns a function that runs the command of a case in its directory, and returns the exit status."""


class _Running:
    """A case in its own directory."""

    def __init__(self, case: Case, seed: int, template: Path, root: Path, limits: tuple[float, int], command: Command):
        sandbox.reset(template, root)
        if case.prepare is not None:
            case.prepare(root, case.random(seed))
        self.case, self.root = case, root
        self._before = sandbox.snapshot(root)
        self.child = Child(command(case, root), root, root.with_suffix(".log"), *limits)

    def finish(self) -> tuple[Result, Ended]:
        """Wait for the end of the case and judge it."""
        ended = self.child.finish()
        changed = sandbox.changed(self._before, sandbox.snapshot(self.root))
        verdict = judge(self.case, ended, changed)
        said = ended.output.strip().splitlines()[-1:]
        text = "".join(said)[:300].replace(str(self.root), "{root}")
        fields = (self.case.name, self.case.area, verdict.kind, verdict.violations, round(ended.seconds, 2), text)
        return Result(*fields), ended


def run(
    cases: Sequence[Case],
    seed: int,
    *,
    workers: int = 2,
    limits: tuple[float, int] = (SECONDS, PROCESSOR_SECONDS),
    write_template: Callable[[Path], None] = sandbox.write_template,
    command: Command | None = None,
) -> Iterator[tuple[Result, Ended]]:
    """Run cases and yield each result as soon as it is known.

    Args:
        workers: cases that run at a time.
        limits: time and processor time of a case, in seconds.
        write_template: writes the directory that each case gets a copy of.
        command: returns the body of a case in its directory; None for verl's command line.
    """
    if command is None:
        from campaign.verl_command import body, preload

        preload()

        def command(case: Case, root: Path) -> Callable[[], int]:
            return body(case.command(root), composes=case.composes)

    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        template = Path(folder) / "template"
        write_template(template)
        waiting, running = list(reversed(cases)), list[_Running]()
        free = [Path(folder) / f"worker{i}" for i in range(workers)]
        while waiting or running:
            while waiting and free:
                running.append(_Running(waiting.pop(), seed, template, free.pop(), limits, command))
            wait([one.child.fd for one in running], min(one.child.left() for one in running))
            ready = set(wait([one.child.fd for one in running], 0))
            for one in [one for one in running if one.child.fd in ready or not one.child.left()]:
                running.remove(one)
                free.append(one.root)
                yield one.finish()
