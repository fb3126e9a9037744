"""What a config key is: a dataclass field that carries its help, its unit and the values that work.

    @dataclass
    class DataConfig:
        train_batch_size: int = key(1024, "prompts of one training step", unit="prompts", at_least=1)

`only` lists the values that are supported so far; any other is a known one whose feature is not there yet.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_METADATA = "key"


@dataclass(frozen=True)
class Key:
    """What is known about a key besides its type and default.

    Attributes:
        help: what it does.
        unit: of the value: prompts, samples, tokens, seconds, MiB, steps, ...; empty where it has none.
        choices: values that work; empty for any.
        planned: values that are known and not supported yet.
        only: values supported so far; None for any.
        use: for `only` and `planned`: what to use instead.
        at_least, above, at_most, below: bounds of a number, in a list of each.
        items: how many a list holds.
        required: null is an error.
        path: a path on this host; `~` and relative ones are made absolute.
        hub: or the name of a model on the Hugging Face hub, which stands for its directory in the hub's cache.
    """

    help: str = ""
    unit: str = ""
    choices: tuple[Any, ...] = ()
    planned: tuple[Any, ...] = ()
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


def key(default: Any, help: str, **known: Any) -> Any:
    """A field with a default; `known` are further attributes of `Key`."""
    metadata = {_METADATA: Key(help=help, **known)}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def planned(default: Any, feature: str, use: str = "") -> Any:
    """A key of a feature that is not there yet: only its default is accepted, which leaves the feature off."""
    return key(default, f"{feature}: not supported yet", only=(default,), use=use or f"use {show(default)}")


def section(cls: type, help: str) -> Any:
    """A field that holds another dataclass."""
    return dataclasses.field(default_factory=cls, metadata={_METADATA: Key(help=help)})


def key_of(field: dataclasses.Field[Any]) -> Key:
    """What a field knows about itself."""
    return field.metadata.get(_METADATA, Key())


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every key below a dataclass instance as (dotted name, field, value), sections themselves left out."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            yield name, field, value


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return str(value)
