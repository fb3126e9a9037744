"""Registry of functions or classes by name, which users extend with a decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def registered_name(name: str | Enum, kind: str) -> str:
    """Return the text of a name, because a config can select an entry only by text.

    Args:
        name: text, or a member of an enum whose value is text.
        kind: noun for an entry in error messages, for example "policy loss".

    Raises:
        TypeError: the name is neither.
    """
    text = name.value if isinstance(name, Enum) else name
    if not isinstance(text, str) or not text:
        raise TypeError(f"{kind} name {name!r}: must be text, or a member of an enum whose value is text")
    return str(text)


class Registry:
    """Functions or classes by name.

    Args:
        kind: noun for an entry in error messages, for example "policy loss".
        key: config key that selects an entry.
        unsupported: names that exist in upstream verl and are not implemented here.
    """

    def __init__(self, kind: str, key: str, unsupported: Iterable[str] = ()):
        self._kind = kind
        self._key = key
        self._unsupported = frozenset(unsupported)
        self._functions: dict[str, Callable[..., Any]] = {}

    def register(self, name: str | Enum) -> Callable[[F], F]:
        """Return a decorator that adds a function under `name`; the same function may be registered again.

        Raises:
            TypeError: the name is neither text nor a member of an enum of texts.
            ValueError: another function already has that name.
        """
        name = registered_name(name, self._kind)

        def add(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and _origin(known) != _origin(function):
                raise ValueError(
                    f"duplicate name: {self._kind} {name!r} is already registered by {'.'.join(_origin(known))}; "
                    "choose another name"
                )
            self._functions[name] = function
            return function

        return add

    def get(self, name: str | Enum) -> Callable[..., Any]:
        """Return the function registered under `name`.

        Raises:
            TypeError: the name is neither text nor a member of an enum of texts.
            ValueError: no function has that name; the message lists the registered names.
        """
        name = registered_name(name, self._kind)
        if name in self._functions:
            return self._functions[name]
        reason = "is not supported yet" if name in self._unsupported else "is not registered"
        raise ValueError(f"{self._key}={name!r} {reason}: use one of {', '.join(self.names())}")

    def names(self) -> list[str]:
        """Return all registered names, sorted."""
        return sorted(self._functions)


def import_all(package: str, path: Iterable[str]) -> None:
    """Import all modules of a package, so that they register their functions.

    Args:
        package: its `__name__`.
        path: its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
