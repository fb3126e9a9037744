"""A name-to-function table that users extend with a decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """Functions by name.

    Args:
        kind: what an entry is, as it reads in an error.
        key: the config key that chooses an entry.
        planned: names that this framework knows but does not implement yet.
    """

    def __init__(self, kind: str, key: str, planned: Iterable[str] = ()):
        self._kind = kind
        self._key = key
        self._planned = frozenset(planned)
        self._functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Decorator that adds a function under `name`; the same function may be registered again.

        Raises:
            ValueError: another function already has that name.
        """

        def add(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and _origin(known) != _origin(function):
                raise ValueError(
                    f"{self._kind} {name!r} is already registered by {'.'.join(_origin(known))}: choose another name"
                )
            self._functions[name] = function
            return function

        return add

    def get(self, name: str) -> Callable[..., Any]:
        """The function registered under `name`.

        Raises:
            ValueError: nothing is registered under it; lists what is.
        """
        if name in self._functions:
            return self._functions[name]
        reason = "is not supported yet" if name in self._planned else "is not registered"
        raise ValueError(f"{self._key}={name!r} {reason}: use one of {', '.join(self.names())}")

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._functions)


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
