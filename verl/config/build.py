"""Convert nested dicts to the config dataclasses; reports unknown keys and wrong types, but not wrong values."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from verl.config import hints, upstream
from verl.config.errors import ConfigError, unknown_key
from verl.config.schema import Key, key_of, show
from verl.extension.paths import path_problem
from verl.utils.model_dir.hub import cached_model

T = TypeVar("T")
MAX_INT = 2**31 - 1  # of a key
_MAX_SHOWN = 200
_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


class _WrongType(Exception):
    """A value has another type than expected; the message describes the expected type."""


@dataclasses.dataclass
class Collected:
    """Keys that `collect` could not use.

    Attributes:
        problems: an error text for each value of a wrong type, by key.
        unknown: values of unknown keys, by dotted name.
    """

    problems: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: dict[str, Any] = dataclasses.field(default_factory=dict)


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return an instance of the dataclass `cls`; keys that `values` lacks keep their defaults.

    Raises:
        ConfigError: lists all unknown keys, with the nearest known ones, and all values of a wrong type.
    """
    config, collected = collect(cls, values)
    problems = [*collected.problems.values(), *(unknown_key_problem(key, cls) for key in collected.unknown)]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config


def collect(cls: type[T], values: Mapping[str, Any]) -> tuple[T, Collected]:
    """Return an instance of the dataclass `cls`, and the keys that it could not use; these keep their defaults."""
    collected = Collected()
    config: T = _build(cls, values, "", collected)
    return config, collected


def _build(cls: type, values: Mapping[str, Any], prefix: str, collected: Collected) -> Any:
    field_types, arguments = _field_types(cls), {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        hint = field_types.get(str(name))
        if hint is None:
            collected.unknown |= leaves(path, value)
        elif dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                arguments[name] = _build(typing.cast(type, hint), value, f"{path}.", collected)
            elif value is not None:
                collected.problems[path] = (
                    f"{path}={show(value)}: this is a section; set one of its keys, {_some_keys(hint, path)}"
                )
        else:
            known = _keys(cls)[name]
            if known.path and isinstance(value, str) and (problem := path_problem(value)) is not None:
                collected.problems[path] = f"{path}={_shortened(value)}: {problem}"
                continue
            try:
                arguments[name] = _resolve_path(known, convert(_choice_of_bool(value, known.choices), hint))
            except _WrongType as error:
                collected.problems[path] = f"{path}={_shortened(value)}: must be {error}"
    return cls(**arguments)


def convert(value: Any, hint: Any) -> Any:
    """Return a value as an instance of a type hint.

    A whole number or text such as "1e-6" becomes a float, and a number or truth value becomes text.

    Args:
        hint: bool, int, float, str, Any, list, dict, or a union of them and None.

    Raises:
        _WrongType: the value does not fit.
    """
    options = _union(hint)
    if value is None:
        if type(None) in options:
            return None
        raise _WrongType(f"{describe(hint)}, not null")
    options = [option for option in options if option is not type(None)]
    # The exact type comes first, so that `float | str` keeps text as text.
    for option in sorted(options, key=lambda option: _origin(option) is not type(value)):
        try:
            return _convert_one(value, option)
        except _WrongType:
            continue
    too_large = int in options and isinstance(value, int) and abs(value) > MAX_INT
    raise _WrongType(describe(hint) + (f", at most {MAX_INT}" if too_large else ""))


def _convert_one(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    origin = _origin(hint)
    if origin is list:
        item = typing.get_args(hint)[0]
        if item is str and isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise _WrongType
        return [convert(element, item) for element in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _WrongType
        return {str(name): element for name, element in value.items()}
    if origin is bool:
        return _to_bool(value)
    if isinstance(value, bool):
        if origin is str:
            return str(value)
        raise _WrongType
    if origin is str and isinstance(value, str | int | float):
        return str(value)
    if origin is int:
        return _to_int(value)
    if origin is float and isinstance(value, int | float | str):
        return _to_float(value)
    raise _WrongType


def _choice_of_bool(value: Any, choices: tuple[Any, ...]) -> Any:
    """Return the choice `on` or `off` for a truth value, because YAML reads these words as truth values."""
    if not isinstance(value, bool):
        return value
    word = "on" if value else "off"
    return word if word in choices else value


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _WrongType


def _to_int(value: Any) -> int:
    number = _to_float(value) if isinstance(value, str | float) else value
    if not isinstance(number, int | float) or number != int(number) or abs(number) > MAX_INT:
        raise _WrongType
    return int(number)


def _to_float(value: Any) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _WrongType from None
    if number != number or number in (float("inf"), float("-inf")):
        raise _WrongType
    return number


def describe(hint: Any) -> str:
    """Return a type hint in words."""
    parts = []
    for option in _union(hint):
        origin = _origin(option)
        if origin is type(None):
            parts.append("null")
        elif origin is list:
            parts.append(f"a list such as [{'a,b' if typing.get_args(option)[0] is str else '1,2'}]")
        elif origin is dict:
            parts.append("a mapping such as {name: value}")
        else:
            parts.append(_TYPE_NAMES.get(origin, str(origin)))
    return " or ".join(parts)


def unknown_key_problem(key: str, cls: type) -> str:
    """Return the error text for an unknown key: the replacement of a key of upstream verl, or the nearest keys."""
    known = key_types(cls)
    return (
        hints.upstream_key_hint(key)
        or upstream.feature_hint(key, known, sections(cls))
        or unknown_key(key, nearest_keys(key, tuple(known)))
    )


def nearest_keys(key: str, known: tuple[str, ...]) -> list[str]:
    """Return at most two keys that the user may have meant.

    These are a key with a similar name in the same section, and a key with the same name in another section.
    """
    section, _, last = key.rpartition(".")
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    siblings = {name.rpartition(".")[2]: name for name in known if section and name.rpartition(".")[0] == section}
    found = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    found += difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
    # The cutoff is high because all keys of a section share its name and are therefore similar.
    return found or difflib.get_close_matches(key, known, n=1, cutoff=0.9)


@functools.cache
def key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type hint of every key below a dataclass, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in _field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= key_types(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


@functools.cache
def sections(cls: type, prefix: str = "") -> frozenset[str]:
    """Return the dotted names of all dataclasses below a dataclass."""
    found: set[str] = set()
    for name, hint in _field_types(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{prefix}{name}"} | sections(typing.cast(type, hint), f"{prefix}{name}.")
    return frozenset(found)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    types_by_name = typing.get_type_hints(cls)
    return {field.name: types_by_name[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _keys(cls: type) -> dict[str, Key]:
    return {field.name: key_of(field) for field in dataclasses.fields(cls)}


def _resolve_path(known: Key, value: Any) -> Any:
    """Return a path as an absolute path or the directory of a model in the hub's cache; other values are unchanged."""
    if not known.path or not value:
        return value
    return (known.hub and cached_model(value)) or os.path.abspath(os.path.expanduser(value))


def _origin(hint: Any) -> Any:
    """Return the class of a generic type hint, such as list for list[str], or the hint itself."""
    return typing.get_origin(hint) or hint


def _union(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _shortened(value: Any) -> str:
    text = show(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def leaves(path: str, value: Any) -> dict[str, Any]:
    """Return the values inside a mapping by dotted name; a value that is no mapping has the name `path`."""
    if isinstance(value, Mapping) and value:
        return {leaf: inner for name, item in value.items() for leaf, inner in leaves(f"{path}.{name}", item).items()}
    return {path: value}


def _some_keys(hint: Any, path: str) -> str:
    names = [field.name for field in dataclasses.fields(hint)]
    return ", ".join(f"{path}.{name}" for name in names[:3]) + (", ..." if len(names) > 3 else "")
