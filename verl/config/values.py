"""Checks each value by itself, against what its field says works."""

from __future__ import annotations

import difflib
import sys
from typing import Any

from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.config.schema import Key, key_of, show, walk

# Names that a user's own code may have added, and the registry (module, attribute) that then knows them.
_EXTENSIBLE = {
    "algorithm.adv_estimator": ("verl.algorithms.advantages.common", "ADV_ESTIMATORS"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": ("verl.algorithms.losses.common", "POLICY_LOSSES"),
}


def value_problems(config: PPOConfig) -> dict[str, str]:
    """By key: what is wrong with each value that is missing, unknown, out of bounds or not supported yet.

    A feature that is not there is none to miss in a role that the run does not have.
    """
    problems = {}
    absent = () if needs_ref(config) else ("actor_rollout_ref.ref.",)
    absent += () if needs_critic(config) else ("critic.",)
    for name, field, value in walk(config):
        key = key_of(field)
        if value is None and key.required:
            problems[name] = f"{name} is not set: give a {key.help}"
            continue
        if name.startswith(absent) and _is_planned(key, value):
            continue
        problem = _problem(name, key, value)
        if problem is not None:
            problems[name] = f"{name}={show(value)}{problem}"
    return problems


def _is_planned(key: Key, value: Any) -> bool:
    """Whether a value belongs to a feature that is known and not supported yet."""
    if key.only is not None:
        return not any(_equal(value, only) for only in key.only)
    return isinstance(value, str) and value in key.planned


def _problem(name: str, key: Key, value: Any) -> str | None:
    if key.only is not None and _is_planned(key, value):
        return f" is not supported yet ({key.help.split(':')[0]}): {key.use}"
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    if key.items is not None and len(items) != key.items:
        return f": {len(items)} values; give {key.items}, {key.help}"
    for item in items:
        if key.choices and item not in key.choices and item not in _registered(name):
            return _no_choice(key, item)
        if isinstance(item, int | float) and not isinstance(item, bool):
            problem = _out_of_bounds(key, item)
            if problem is not None:
                return problem
    return None


def _equal(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _no_choice(key: Key, item: Any) -> str:
    if item in key.planned:
        return f": {item} is not supported yet; {key.use}"
    near = difflib.get_close_matches(str(item), [show(choice) for choice in [*key.choices, *key.planned]], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    known = f"use one of {', '.join(map(show, key.choices))}"
    return f": {show(item)} is unknown{hint}; {known}"


def _out_of_bounds(key: Key, value: float) -> str | None:
    bounds = (
        (key.at_least, value < (key.at_least or 0), "at least"),
        (key.above, value <= (key.above or 0), "above"),
        (key.at_most, value > (key.at_most or 0), "at most"),
        (key.below, value >= (key.below or 0), "below"),
    )
    for bound, broken, words in bounds:
        if bound is not None and broken:
            unit = f" {key.unit}" if key.unit else ""
            return f": has to be {words} {bound:g}{unit}"
    return None


def _registered(name: str) -> list[str]:
    """Names in the registry behind a key, if something imported it already: it holds functions on torch tensors."""
    module, attribute = _EXTENSIBLE.get(name, ("", ""))
    return getattr(sys.modules[module], attribute).names() if module in sys.modules else []
