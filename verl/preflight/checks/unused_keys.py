"""Notes about changed keys that have no effect in this run; their conditions are in `verl.config`, beside the keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from verl.config.conditions import on_accelerator
from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.run_facts import RunFacts
from verl.config.schema import Condition, key_of, walk
from verl.preflight.checks.agent import rows_choose_loop


def unused_key_notes(config: PPOConfig, device: str) -> list[str]:
    """Return one note per reason, with the changed keys that have no effect for this reason.

    The note about a CPU also names unchanged keys, because their defaults are meant for an accelerator.

    Args:
        config: a config; conditions that read an invalid section add no note.
        device: `cpu`, `cuda` or `npu`.
    """
    run = RunFacts(config, device, rows_choose_loop(config))
    defaults = {name: value for name, _, value in walk(PPOConfig())}
    changed = {name for name, _, value in walk(config) if value != defaults[name]}
    unused: dict[str, list[str]] = {}
    for reason, name, always in _unused_keys(config, run):
        if always or name in changed or name not in defaults:
            unused.setdefault(reason, []).append(name)
    return [f"no effect {reason}: {', '.join(sorted(names))}" for reason, names in unused.items()]


def _unused_keys(section: Any, run: RunFacts, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Yield (reason, dotted name, note it even if unchanged) for each key of a section that has no effect.

    If a condition of a whole section does not hold, it replaces the conditions of the keys inside.
    """
    for field in dataclasses.fields(section):
        name, key, value = f"{prefix}{field.name}", key_of(field), getattr(section, field.name)
        is_section, used = dataclasses.is_dataclass(value), True
        for condition in key.only_with:
            reason = _why_not(condition, run, name)
            if reason is not None:
                used = False
                names = [inner for inner, *_ in walk(value, f"{name}.")] if is_section else [name]
                yield from ((reason, inner, condition is on_accelerator) for inner in names)
        if is_section and used:
            yield from _unused_keys(value, run, f"{name}.")
        for entry, condition in key.entries_only_with.items():
            reason = _why_not(condition, run, f"{name}.{entry}")
            if entry in (value or {}) and reason is not None:
                yield reason, f"{name}.{entry}", False


def _why_not(condition: Condition, run: RunFacts, name: str) -> str | None:
    """Return why a key has no effect; None if it has one, or if an invalid section leaves that open."""
    try:
        return condition.why_not(run, name)
    except ConfigError:
        return None  # the check of this section reports its errors
