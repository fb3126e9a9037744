"""Config keys: dataclass fields with a help text, a unit, the accepted values, and the conditions of their effect.

@dataclass
class DataConfig:
    train_batch_size: int = key(1024, "prompts per training step", unit="prompts", at_least=1)
    seed: int | None = key(None, "seed of the order of prompts", only_with=when("shuffle"))
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

_METADATA = "key"


class ConfigSection(Mapping[str, Any]):
    """Base of the config dataclasses: a section is also a mapping, `config.get("name", default)`, `config["name"]`.

    The names are the fields, and attributes that are added to an instance. `get` returns the default for other names.
    """

    def __getitem__(self, name: str) -> Any:
        if name not in vars(self):
            raise KeyError(f"{type(self).__name__} has no key {name!r}; its keys are {', '.join(vars(self))}")
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


class Run(Protocol):
    """The values that conditions read; `verl.config.run_facts.RunFacts` implements it."""

    def value(self, name: str) -> Any:
        """Return the value of a key by its dotted name, or of a fact by `run.<name>`."""
        ...


@dataclass(frozen=True)
class Condition:
    """A condition of a key's effect; `verl.config.conditions` makes them.

    Attributes:
        why_not: takes a run and the dotted name of the key, and returns why the key has no effect in this run; None if
            it has one.
        words: takes the dotted name of the key, and returns the condition as text behind "only with".
    """

    why_not: Callable[[Run, str], str | None]
    words: Callable[[str], str]


@dataclass(frozen=True)
class Key:
    """Properties of a key apart from its type and default.

    Attributes:
        help: effect of the key.
        unit: unit of the value: prompts, samples, tokens, seconds, MiB, training steps, ...; empty for a plain value.
        choices: supported values; empty if any value is.
        unsupported: known values that are not supported.
        only: the only supported values of a key whose feature is not supported; None for other keys.
        use: for `unsupported` and `only`: what to use instead.
        at_least, above, at_most, below: bounds of a number, or of each number in a list.
        items: required length of a list.
        required: null is an error.
        path: the value is a path on this host; `~` and relative paths become absolute.
        hub: with `path`: the value may also be the name of a model on the Hugging Face hub. It then stands for the
            model's directory in the hub's cache.
        same_if: with this condition, every value means what is done anyway.
        only_with: the key has no effect in a run unless all these conditions hold.
        entries_only_with: the same for single entries of a mapping, by name.
    """

    help: str = ""
    unit: str = ""
    choices: tuple[Any, ...] = ()
    unsupported: tuple[Any, ...] = ()
    only: tuple[Any, ...] | None = None
    use: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    items: int | None = None
    required: bool = False
    path: bool = False
    hub: bool = False
    same_if: Condition | None = None
    only_with: tuple[Condition, ...] = ()
    entries_only_with: Mapping[str, Condition] = dataclasses.field(default_factory=dict)


def key(
    default: Any,
    help: str,
    *,
    unit: str = "",
    choices: tuple[Any, ...] = (),
    unsupported: tuple[Any, ...] = (),
    only: tuple[Any, ...] | None = None,
    use: str = "",
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    items: int | None = None,
    required: bool = False,
    path: bool = False,
    hub: bool = False,
    same_if: Condition | None = None,
    only_with: Condition | tuple[Condition, ...] = (),
    entries_only_with: Mapping[str, Condition] | None = None,
) -> Any:
    """Return a dataclass field with this default; the other arguments are attributes of `Key`."""
    known = Key(
        help=help,
        unit=unit,
        choices=choices,
        unsupported=unsupported,
        only=only,
        use=use,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        items=items,
        required=required,
        path=path,
        hub=hub,
        same_if=same_if,
        only_with=_as_tuple(only_with),
        entries_only_with=entries_only_with or {},
    )
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={_METADATA: known})
    return dataclasses.field(default=default, metadata={_METADATA: known})


def unsupported(default: Any, feature: str, use: str = "", *, same_if: Condition | None = None) -> Any:
    """Return a field of a feature that is not supported: it accepts only its default, which leaves the feature off.

    Args:
        same_if: condition with which all other values mean the same.
    """
    return key(
        default, f"{feature}: not supported", only=(default,), use=use or f"use {show(default)}", same_if=same_if
    )


def without_effect(default: Any, reason: str) -> Any:
    """Return a field that is accepted for compatibility: no value changes a result; another value than the default is
    noted with the reason."""
    never = Condition(lambda run, key: f"because {reason}", lambda key: "")
    return key(default, f"accepted for compatibility, no effect: {reason}", only_with=never)


def section(cls: type, help: str, only_with: Condition | tuple[Condition, ...] = ()) -> Any:
    """Return a field that holds another dataclass; without its conditions, no key of it has an effect."""
    metadata = {_METADATA: Key(help=help, only_with=_as_tuple(only_with))}
    return dataclasses.field(default_factory=cls, metadata=metadata)


def key_of(field: dataclasses.Field[Any]) -> Key:
    """Return the properties of a field."""
    known: Key = field.metadata.get(_METADATA, Key())
    return known


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted name, field, value) of every key below a dataclass instance, without the sections themselves."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            yield name, field, value


def show(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value)


def _as_tuple(only_with: Condition | tuple[Condition, ...]) -> tuple[Condition, ...]:
    return only_with if isinstance(only_with, tuple) else (only_with,)
