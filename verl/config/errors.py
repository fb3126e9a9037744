"""The one error of this package."""

from __future__ import annotations

from collections.abc import Iterable


class ConfigError(ValueError):
    """Everything that is wrong with a config, one entry a problem: field, what was given, what to do.

    Attributes:
        problems: the entries.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"- {problem}" for problem in self.problems)
