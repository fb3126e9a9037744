"""Check each value of a config separately against the properties of its key."""

from __future__ import annotations

import sys
from typing import Any

from verl.config.errors import ConfigError, unknown_value
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.config.run_facts import RunFacts
from verl.config.schema import Key, key_of, show, walk

# Keys whose names the user's own code can extend, and the registry (module, attribute) that contains these names.
_EXTENSIBLE = {
    "algorithm.adv_estimator": ("verl.algorithms.advantages.common", "ADV_ESTIMATORS"),
    "actor_rollout_ref.actor.policy_loss.loss_mode": ("verl.algorithms.losses.common", "POLICY_LOSSES"),
    "reward.reward_manager.name": ("verl.workers.reward_manager.registry", "REWARD_MANAGERS"),
}


def value_problems(config: PPOConfig) -> dict[str, str]:
    """Return, by key, an error text for each value that is missing, unknown, out of bounds or not supported.

    Unsupported values are ignored in roles that this run does not use.
    """
    problems = {}
    unused_roles: tuple[str, ...] = () if needs_ref(config) else ("actor_rollout_ref.ref.",)
    unused_roles += () if needs_critic(config) else ("critic.",)
    for name, field, value in walk(config):
        key = key_of(field)
        if value is None and key.required:
            problems[name] = f"{name} is not set; give: {key.help}"
            continue
        if name.startswith(unused_roles) and _is_unsupported(key, value):
            continue
        problem = _problem(name, key, value)
        if problem is not None and _asks_for_nothing(config, name, key, value):
            continue
        if problem is not None:
            problems[name] = f"{name}={show(value)}{problem}"
    return problems


def _is_unsupported(key: Key, value: Any) -> bool:
    """Return True if the value belongs to a feature that is known but not supported."""
    if key.only is not None:
        return not any(_equal(value, only) for only in key.only)
    return isinstance(value, str) and value in key.unsupported


def _asks_for_nothing(config: PPOConfig, name: str, key: Key, value: Any) -> bool:
    """Return True if all values mean the same, or if an unsupported one has no effect, which a note says."""
    run = RunFacts(config, device="", rows_choose_loop=False)
    try:
        if key.same_if is not None and key.same_if.why_not(run, name) is None:
            return True
        unused = any(condition.why_not(run, name) is not None for condition in key.only_with)
        return unused and _is_unsupported(key, value)
    except ConfigError:
        return False  # the check of another section reports its errors


def _problem(name: str, key: Key, value: Any) -> str | None:
    """Return the text to put after `name=value`; None if the value works."""
    if key.only is not None and _is_unsupported(key, value):
        return f" is not supported ({key.help.split(':')[0]}); {key.use}"
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    if key.items is not None and len(items) != key.items:
        return f": {len(items)} values; give {key.items}, {key.help}"
    for item in items:
        if key.choices and item not in key.choices and item not in _registered(name):
            return _choice_problem(key, item)
        if isinstance(item, int | float) and not isinstance(item, bool):
            problem = _bound_problem(key, item)
            if problem is not None:
                return problem
    return None


def _equal(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _choice_problem(key: Key, item: Any) -> str:
    if item in key.unsupported:
        return f": {item} is not supported; {key.use}"
    return f": {unknown_value(item, key.choices, also_similar=key.unsupported)}"


def _bound_problem(key: Key, value: float) -> str | None:
    bounds = (
        (key.at_least, value < (key.at_least or 0), "at least"),
        (key.above, value <= (key.above or 0), "above"),
        (key.at_most, value > (key.at_most or 0), "at most"),
        (key.below, value >= (key.below or 0), "below"),
    )
    for bound, exceeded, words in bounds:
        if bound is not None and exceeded:
            unit = f" {key.unit}" if key.unit else ""
            return f": must be {words} {bound:g}{unit}"
    return None


def _registered(name: str) -> list[str]:
    """Return the names in the registry of a key, if its module is imported; importing it here would import torch."""
    module, attribute = _EXTENSIBLE.get(name, ("", ""))
    if module not in sys.modules:
        return []
    names: list[str] = getattr(sys.modules[module], attribute).names()
    return names
