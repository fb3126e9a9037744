"""From plain nested dicts to the dataclasses: unknown keys and wrong types are found here, values are not judged."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

from verl.config.errors import ConfigError
from verl.config.hints import hint as hint_for
from verl.config.schema import Key, key_of, show
from verl.utils.model_dir.hub import cached_model

_LARGEST_INT = 2**31 - 1
_LONGEST_SHOWN = 200
_TYPE_NAMES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


class _Mismatch(Exception):
    """A value does not have the type; the message says which was expected."""


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the dataclass `cls`; keys that `values` lacks keep their defaults.

    Raises:
        ConfigError: lists every unknown key, with the nearest known one, and every value of a wrong type.
    """
    problems: list[str] = []
    config = _build(cls, values, "", tuple(key_types(cls)), problems)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config


def _build(cls: type, values: Mapping[str, Any], prefix: str, known: tuple[str, ...], problems: list[str]) -> Any:
    hints = _hints(cls)
    arguments = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        hint = hints.get(str(name))
        if hint is None:
            problems += [unknown_key(key, known) for key in _leaves(path, value)]
        elif dataclasses.is_dataclass(hint):
            if isinstance(value, Mapping):
                arguments[name] = _build(typing.cast(type, hint), value, f"{path}.", known, problems)
            elif value is not None:
                problems.append(
                    f"{path}={show(value)}: this is a section; set one of its keys, {_some_keys(hint, path)}"
                )
        else:
            value = _unquoted(value, _keys(cls)[name].choices)
            try:
                arguments[name] = _found(cls, name, convert(value, hint))
            except _Mismatch as error:
                problems.append(f"{path}={_short(value)}: give {error}")
    return cls(**arguments)


def convert(value: Any, hint: Any) -> Any:
    """`value` as an instance of a type hint (bool, int, float, str, list, dict, unions with None); raises `_Mismatch`.

    A whole number stands for a float, "1e-6" in text for the number, and a number or truth value for text.
    """
    options = _union(hint)
    if value is None:
        if type(None) in options:
            return None
        raise _Mismatch(f"{describe(hint)}, not null")
    options = [option for option in options if option is not type(None)]
    # The exact type first, so that `float | str` keeps text as text.
    for option in sorted(options, key=lambda option: (typing.get_origin(option) or option) is not type(value)):
        try:
            return _convert_one(value, option)
        except _Mismatch:
            continue
    too_large = int in options and isinstance(value, int) and abs(value) > _LARGEST_INT
    raise _Mismatch(describe(hint) + (f", at most {_LARGEST_INT}" if too_large else ""))


def _convert_one(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin is Any:
        return value
    if origin is list:
        item = typing.get_args(hint)[0]
        if item is str and isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise _Mismatch
        return [convert(element, item) for element in value]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _Mismatch
        return {str(name): element for name, element in value.items()}
    if origin is bool:
        return _to_bool(value)
    if isinstance(value, bool):
        if origin is str:
            return str(value)
        raise _Mismatch
    if origin is str and isinstance(value, str | int | float):
        return str(value)
    if origin is int:
        return _to_int(value)
    if origin is float and isinstance(value, int | float | str):
        return _to_float(value)
    raise _Mismatch


def _unquoted(value: Any, choices: tuple[Any, ...]) -> Any:
    """A choice that YAML took for a truth value: `off` and `on` without quotes."""
    if not isinstance(value, bool):
        return value
    word = "on" if value else "off"
    return word if word in choices else value


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise _Mismatch


def _to_int(value: Any) -> int:
    number = _to_float(value) if isinstance(value, str | float) else value
    if not isinstance(number, int | float) or number != int(number) or abs(number) > _LARGEST_INT:
        raise _Mismatch
    return int(number)


def _to_float(value: Any) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Mismatch from None
    if number != number or number in (float("inf"), float("-inf")):
        raise _Mismatch
    return number


def describe(hint: Any) -> str:
    """A type hint in words."""
    parts = []
    for option in _union(hint):
        origin = typing.get_origin(option) or option
        if origin is type(None):
            parts.append("null")
        elif origin is list:
            parts.append(f"a list such as [{'a,b' if typing.get_args(option)[0] is str else '1,2'}]")
        elif origin is dict:
            parts.append("a mapping such as {name: value}")
        else:
            parts.append(_TYPE_NAMES.get(origin, str(origin)))
    return " or ".join(parts)


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    """What is wrong with an unknown key, and what to use: the way here of one that verl has, or the nearest known."""
    verls = hint_for(key)
    if verls is not None:
        return verls
    near = nearest(key, known)
    hint = f"; did you mean {' or '.join(near)}?" if near else ", and none like it"
    return f"{key}: there is no such key{hint}"


def nearest(key: str, known: tuple[str, ...]) -> list[str]:
    """What `key` probably stands for, at most two keys: one of the same name elsewhere, one of the same section."""
    section, _, last = key.rpartition(".")
    same_name = [name for name in known if name.rpartition(".")[2] == last]
    siblings = {name.rpartition(".")[2]: name for name in known if section and name.rpartition(".")[0] == section}
    found = [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)]
    found += difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
    # Keys of one section look alike by its name alone.
    return found or difflib.get_close_matches(key, known, n=1, cutoff=0.9)


@functools.cache
def key_types(cls: type, prefix: str = "") -> dict[str, Any]:
    """Type hint of every key below a dataclass, by dotted name."""
    found: dict[str, Any] = {}
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= key_types(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = hint
    return found


@functools.cache
def sections(cls: type, prefix: str = "") -> frozenset[str]:
    """Dotted names of the dataclasses below a dataclass."""
    found: set[str] = set()
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{prefix}{name}"} | sections(typing.cast(type, hint), f"{prefix}{name}.")
    return frozenset(found)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def _keys(cls: type) -> dict[str, Key]:
    return {field.name: key_of(field) for field in dataclasses.fields(cls)}


def _found(cls: type, name: str, value: Any) -> Any:
    """A value; a path made absolute."""
    key = _keys(cls)[name]
    if not key.path or not value:
        return value
    return (key.hub and cached_model(value)) or os.path.abspath(os.path.expanduser(value))


def _union(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return list(typing.get_args(hint))
    return [hint]


def _short(value: Any) -> str:
    text = show(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _leaves(path: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and value:
        return [leaf for name, item in value.items() for leaf in _leaves(f"{path}.{name}", item)]
    return [path]


def _some_keys(hint: Any, path: str) -> str:
    names = [field.name for field in dataclasses.fields(hint)]
    return ", ".join(f"{path}.{name}" for name in names[:3]) + (", ..." if len(names) > 3 else "")
