"""A case: input for one command of verl, and the texts that an error about it must contain."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Damage = Callable[[Path, random.Random], None]
"""Changes a file or directory; the random numbers depend on the seed and on the name of the case."""


def has_no_objection(output: str) -> str | None:
    """Return None."""
    return None


def accepts_nothing(output: str) -> str | None:
    """Return why the acceptance is wrong: this input cannot work."""
    return "accepted, although it cannot work"


@dataclass(frozen=True)
class Case:
    """One piece of bad input.

    Attributes:
        name: `area/subject/kind`, which `--only` takes.
        area: row of the table.
        words: command line of verl. `{root}` stands for the directory in which the case runs.
        named: an error contains at least one text of each of these tuples: the field, the value, or the file.
        why_unnamed: takes the output of a refused case; returns why its error does not name the input, or None.
        prepare: changes the input files in the directory.
        outputs: paths below the directory that the command may write if it accepts the input.
        why_illegal: takes the output of an accepted case; returns why the acceptance is wrong, or None.
        composes: the command composes its config with Hydra, which takes seconds, as a user's command does. Otherwise
            the defaults are composed once for all cases, and Hydra applies the overrides to them.
        must_accept: the input is not bad; without such cases, every command might fail for another reason.
    """

    name: str
    area: str
    words: tuple[str, ...]
    named: tuple[tuple[str, ...], ...]
    why_unnamed: Callable[[str], str | None] = field(default=has_no_objection)
    prepare: Damage | None = None
    outputs: tuple[str, ...] = ()
    why_illegal: Callable[[str], str | None] = field(default=has_no_objection)
    composes: bool = False
    must_accept: bool = False

    def random(self, seed: int) -> random.Random:
        """Return the random numbers of this case."""
        return random.Random(f"{seed}/{self.name}")

    def command(self, root: Path) -> list[str]:
        """Return the command line for a directory."""
        return [word.replace("{root}", str(root)) for word in self.words]


def select(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Return the cases with these names, or whose names begin with one of them and a slash.

    Raises:
        ValueError: no case has such a name.
    """
    chosen = [case for case in cases if any(case.name == name or case.name.startswith(f"{name}/") for name in names)]
    for name in names:
        if not any(case.name == name or case.name.startswith(f"{name}/") for case in chosen):
            raise ValueError(f"--only {name}: no such case; --list prints the names")
    return chosen
