"""Conditions of a key's effect, written beside the key: `key(..., only_with=when("partial_rollout"))`.

A condition names another value in one of three ways: a name without a dot is a key of the same section, a name with
dots is a full key, and `run.<name>` is a fact of `verl.config.run_facts.RunFacts`. The reason that a user sees is
`with KEY=VALUE`, or the text in `reason`. In this text, `{name}` is replaced by the value of that name.
"""

from __future__ import annotations

import re
from typing import Any

from verl.config import names
from verl.config.schema import Condition, Run, show


def when(name: str, *values: Any, at_least: float | None = None, null_means: str = "", reason: str = "") -> Condition:
    """Return the condition that a value is one of `values` (default: True).

    Args:
        name: the other value. A list fulfills the condition if one of its items does.
        values: accepted values.
        at_least: accept numbers from this one upward instead of `values`.
        null_means: key whose value replaces a null value.
        reason: text for the user.
    """
    return _compare(True, name, values or (True,), at_least, null_means, reason)


def unless(name: str, *values: Any, at_least: float | None = None, null_means: str = "", reason: str = "") -> Condition:
    """Return the opposite of `when` with the same arguments."""
    return _compare(False, name, values or (True,), at_least, null_means, reason)


def any_of(*conditions: Condition, reason: str = "") -> Condition:
    """Return the condition that at least one condition holds; the default reason is the first condition's."""

    def condition(run: Run, key: str) -> str | None:
        reasons = [condition(run, key) for condition in conditions]
        return None if None in reasons else _fill(reason, run, key) or reasons[0]

    return condition


def first_of(*conditions: Condition) -> Condition:
    """Return the condition that all conditions hold; its reason is that of the first one that does not."""

    def condition(run: Run, key: str) -> str | None:
        reasons = [condition(run, key) for condition in conditions]
        return next((reason for reason in reasons if reason is not None), None)

    return condition


def micro_batches(switch: str, *, in_tokens: bool) -> Condition:
    """Return the condition that micro-batches are limited in tokens (dynamic), or else in samples.

    Args:
        switch: key that chooses between the two limits; its null means the actor's value.
        in_tokens: True for the limit in tokens.
    """
    return when(
        switch,
        in_tokens,
        null_means="actor_rollout_ref.actor.use_dynamic_bsz",
        reason="without dynamic micro-batches" if in_tokens else "with dynamic micro-batches",
    )


def on_accelerator(run: Run, key: str) -> str | None:
    """Condition of keys that have no effect on a CPU."""
    return "on a CPU" if run.value("run.device") == "cpu" else None


def read_by_estimator(run: Run, key: str) -> str | None:
    """Condition of keys that only some estimators read; an estimator of the user may read any key."""
    name = run.value("algorithm.adv_estimator")
    estimator = names.ADV_ESTIMATORS.get(name)
    if estimator is None or key.removeprefix("algorithm.") in estimator.reads:
        return None
    return f"with algorithm.adv_estimator={name}"


def read_by_loss(run: Run, key: str) -> str | None:
    """Condition of keys that only some policy losses read; a loss of the user may read any key."""
    loss = names.POLICY_LOSSES.get(run.value("run.loss"))
    if loss is None or key.removeprefix("actor_rollout_ref.actor.") in loss.reads:
        return None
    reason: str = run.value("run.loss_choice")
    return reason


def _compare(
    expected: bool, name: str, values: tuple[Any, ...], at_least: float | None, null_means: str, reason: str
) -> Condition:
    def condition(run: Run, key: str) -> str | None:
        value = run.value(_full_name(name, key))
        if value is None and null_means:
            value = run.value(null_means)
        if at_least is not None:
            holds = value is not None and value >= at_least
        elif isinstance(value, list):
            holds = any(item in values for item in value)
        else:
            holds = value in values
        if holds == expected:
            return None
        shown = f"with {_full_name(name, key).removeprefix('actor_rollout_ref.')}={show(value)}"
        return _fill(reason, run, key) or shown

    return condition


def _full_name(name: str, key: str) -> str:
    return name if "." in name else f"{key.rpartition('.')[0]}.{name}"


def _fill(reason: str, run: Run, key: str) -> str:
    return re.sub(r"\{([^}]+)\}", lambda match: show(run.value(_full_name(match[1], key))), reason)
