"""`ConfigError`, the exception of this package, and the texts for unknown keys and values."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from verl.config.schema import show


class ConfigError(ValueError):
    """A config with all its problems, one text per problem: key, value, what is wrong, what to do.

    Attributes:
        problems: the texts.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"- {problem}" for problem in self.problems)


def unknown_key(key: str, near: Sequence[str] = (), otherwise: str = "docs/config.md lists all keys") -> str:
    """Return the error text for an unknown key.

    Args:
        key: its dotted name.
        near: keys that the user may have meant.
        otherwise: what to do if `near` is empty.
    """
    quoted = [f"'{name}'" for name in near]
    return f"unknown key '{key}'; " + (f"did you mean {' or '.join(quoted)}?" if quoted else otherwise)


def unknown_value(value: Any, known: Sequence[Any], also_similar: Sequence[Any] = ()) -> str:
    """Return the error text for an unknown value: the most similar value, and all known ones.

    Args:
        known: values that work.
        also_similar: other values that the user may have meant.
    """
    candidates = [show(name) for name in (*known, *also_similar)]
    near = difflib.get_close_matches(show(value), candidates, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{show(value)} is unknown{hint}; use one of {', '.join(show(name) for name in known)}"
