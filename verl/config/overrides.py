"""Check and rewrite `key=value` overrides before Hydra reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from verl.config import build, legacy, upstream
from verl.config.ppo import PPOConfig

_BAND = re.compile(r"[0-9.]+_[0-9.]+")


@dataclass
class Prepared:
    """Overrides for Hydra, and those that it does not get.

    Attributes:
        overrides: the overrides.
        given: current names of the keys that they set.
        problems: an error text for each override that cannot be used, by the name of its key.
        unknown: values of unknown keys, by current name.
        old_names: the names under which unknown keys were given, if these moved.
    """

    overrides: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)
    problems: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Any] = field(default_factory=dict)
    old_names: dict[str, str] = field(default_factory=dict)


def prepare(overrides: Sequence[str]) -> Prepared:
    """Check and rewrite overrides.

    `key=value` and `+key=value` of a known key become `++key=value`, which works if a YAML file has the key or not. An
    override is a problem if it cannot be read, deletes a key, or contains several values to try.
    """
    prepared = Prepared()
    for text in overrides:
        text = _quote_band(_quote_home(text))
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, ValueError) as error:  # ValueError: Python refuses integers with thousands of digits
            reason = str(error).splitlines()[0]
            prepared.problems[legacy.current_name(text.partition("=")[0].lstrip("+~"))] = (
                f"{text:.200}: cannot be read as key=value ({reason}); quote values that contain a comma, = or spaces"
            )
            continue
        name = override.key_or_group
        if name == "hydra" or name.startswith(("hydra.", "hydra/")):
            prepared.overrides.append(text)
            continue
        current = legacy.current_name(name)
        problem = _problem(override, current)
        if problem is not None:
            prepared.problems[current] = problem
            continue
        if not _is_known(current):
            prepared.unknown |= build.leaves(current, override.value())
            if name != current:
                prepared.old_names[current] = name
            continue
        if override.value() is None and not _accepts_null(current) and upstream.has_default(current, None):
            continue  # for example the old name of a key, which is null in upstream verl
        prepared.overrides.append(f"++{current}={text.split('=', 1)[1]}")
        prepared.given.update(_keys(current, override.value()))
    return prepared


def _problem(override: Override, name: str) -> str | None:
    """Return the error text of an override of the key `name`; None if it is valid."""
    if override.is_delete():
        return f"~{name}: keys cannot be deleted; set a value instead, such as {name}=null"
    if override.is_sweep_override():
        return (
            f"{override.input_line}: several values are not supported; start one run for each value, or write a list "
            "as [a,b]"
        )
    if name in build.sections(PPOConfig):
        value: Any = override.value()
        if isinstance(value, dict):
            return None
        return f"{override.input_line}: {name} is a section; set one of its keys, as in {name}.key=value"
    return None


def _is_known(name: str) -> bool:
    """Return True for a key, a section, or an entry of a key whose value is a mapping."""
    if name in build.key_types(PPOConfig) or name in build.sections(PPOConfig):
        return True
    return any(name.startswith(f"{mapping}.") for mapping in _mapping_keys())


def _accepts_null(name: str) -> bool:
    return "null" in build.describe(build.key_types(PPOConfig).get(name, Any))


def _keys(name: str, value: Any) -> list[str]:
    """Return the names of the keys that an override of `name` sets; a section may be set as a mapping."""
    if not isinstance(value, dict) or name not in build.sections(PPOConfig):
        return [name]
    return [key for inner, item in value.items() for key in _keys(f"{name}.{inner}", item)]


def _mapping_keys() -> list[str]:
    """Return the keys whose value is a mapping with arbitrary names."""
    return [name for name, hint in build.key_types(PPOConfig).items() if "a mapping" in build.describe(hint)]


def _quote_home(text: str) -> str:
    """Quote a value that begins with `~`, which Hydra does not read without quotes."""
    name, equals, value = text.partition("=")
    return f"{name}={value!r}" if equals and value.startswith("~") else text


def _quote_band(text: str) -> str:
    """Quote a threshold such as 0.5_5, which Hydra and YAML read as the number 0.55 without quotes."""
    name, _, value = text.partition("=")
    return f"{name}={value!r}" if name.endswith("_threshold") and _BAND.fullmatch(value) else text
