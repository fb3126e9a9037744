"""Looks at `key=value` overrides before Hydra does: unknown keys are named, old spellings moved, open ones admitted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from verl.config import build, legacy
from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig

_BAND = re.compile(r"[0-9.]+_[0-9.]+")


@dataclass
class Prepared:
    """Overrides that Hydra takes, and the keys (by their present name) that they set."""

    overrides: list[str] = field(default_factory=list)
    given: set[str] = field(default_factory=set)


def prepare(overrides: Sequence[str]) -> Prepared:
    """Check and rewrite overrides.

    `key=value` and `+key=value` of a known key become `++key=value`, which sets it whether or not a YAML file has it.

    Raises:
        ConfigError: an override cannot be read, sets an unknown key, deletes a key, or gives several values to try.
    """
    prepared, problems = Prepared(), []
    for text in overrides:
        text = _quoted_band(_quoted_home(text))
        try:
            override = OverridesParser.create().parse_override(text)
        except (HydraException, ValueError) as error:  # Python reads no integer of thousands of digits
            reason = str(error).splitlines()[0]
            quote = "quote values that hold , = or spaces"
            problems.append(f"{text:.200}: cannot be read as key=value ({reason}); {quote}")
            continue
        name = override.key_or_group
        if name == "hydra" or name.startswith(("hydra.", "hydra/")):
            prepared.overrides.append(text)
            continue
        current = legacy.current_name(name)
        problem = _problem(override, current)
        if problem is not None:
            moved = name != current and problem.startswith(f"{current}:")
            problems.append(f"{name}, now {problem}" if moved else problem)
            continue
        prepared.overrides.append(f"++{current}={_value_text(text)}")
        prepared.given.update(_keys(current, override.value()) if current in build.sections(PPOConfig) else [current])
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return prepared


def _problem(override: Override, name: str) -> str | None:
    if override.is_delete():
        return f"~{name}: keys cannot be deleted; set it to what it should be, such as {name}=null"
    if override.is_sweep_override():
        return (
            f"{override.input_line}: several values are not supported; start one run for each, or write a list as [a,b]"
        )
    if name in build.sections(PPOConfig):
        value: Any = override.value()
        if isinstance(value, dict):
            return None
        return f"{override.input_line}: {name} is a section; set one of its keys, as in {name}.key=value"
    known = build.key_types(PPOConfig)
    if name in known or any(name.startswith(f"{open_key}.") for open_key in _open_keys()):
        return None
    return build.unknown_key(name, tuple(known))


def _keys(name: str, value: Any) -> list[str]:
    """The keys that a section's value sets."""
    if not isinstance(value, dict) or name not in build.sections(PPOConfig):
        return [name]
    return [key for inner, item in value.items() for key in _keys(f"{name}.{inner}", item)]


def _open_keys() -> list[str]:
    """Keys that hold a mapping with any names."""
    return [name for name, hint in build.key_types(PPOConfig).items() if "a mapping" in build.describe(hint)]


def _quoted_home(text: str) -> str:
    """Hydra takes no `~` in a value without quotes, where users mean their home directory."""
    name, equals, value = text.partition("=")
    return f"{name}={value!r}" if equals and value.startswith("~") else text


def _quoted_band(text: str) -> str:
    """A threshold's 0.5_5 is a band; Hydra, as YAML, takes it for the number 0.55 unless it is quoted."""
    name, _, value = text.partition("=")
    return f"{name}={value!r}" if name.endswith("_threshold") and _BAND.fullmatch(value) else text


def _value_text(text: str) -> str:
    return text.split("=", 1)[1]
