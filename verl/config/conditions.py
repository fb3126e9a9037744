"""Conditions of a key's effect, written beside the key: `key(..., only_with=when("partial_rollout"))`.

A condition names another value in one of three ways: a name without a dot is a key of the same section, a name with
dots is a full key, and `run.<name>` is a fact of `verl.config.run_facts.RunFacts`. The reason that a user sees is
`with KEY=VALUE`, or the text in `reason`. In this text, `{name}` is replaced by the value of that name. docs/config.md
shows the condition as `KEY=VALUE`, or as the text in `words`; a condition on a fact needs `words`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from verl.config import names
from verl.config.schema import Condition, Run, show
from verl.utils.quantization.schemes import SCHEME_NAMES, weight_format_class

_ACTOR = "actor_rollout_ref.actor."


def when(
    name: str, *values: Any, at_least: float | None = None, null_means: str = "", reason: str = "", words: str = ""
) -> Condition:
    """Return the condition that a value is one of `values` (default: True).

    Args:
        name: the other value. A list fulfills the condition if one of its items does.
        values: accepted values.
        at_least: accept numbers from this one upward instead of `values`.
        null_means: key whose value replaces a null value.
        reason: text for the user, if the condition does not hold.
        words: the condition in docs/config.md, behind "only with".
    """
    return _compare(True, name, values or (True,), at_least, null_means, reason, words)


def unless(
    name: str, *values: Any, at_least: float | None = None, null_means: str = "", reason: str = "", words: str = ""
) -> Condition:
    """Return the opposite of `when` with the same arguments."""
    return _compare(False, name, values or (True,), at_least, null_means, reason, words)


def any_of(*conditions: Condition, reason: str = "", words: str = "") -> Condition:
    """Return the condition that at least one condition holds; the default reason is the first condition's."""

    def why_not(run: Run, key: str) -> str | None:
        reasons = [condition.why_not(run, key) for condition in conditions]
        return None if None in reasons else _fill(reason, run, key) or reasons[0]

    return Condition(why_not, lambda key: words or " or ".join(condition.words(key) for condition in conditions))


def first_of(*conditions: Condition) -> Condition:
    """Return the condition that all conditions hold; its reason is that of the first one that does not."""

    def why_not(run: Run, key: str) -> str | None:
        reasons = [condition.why_not(run, key) for condition in conditions]
        return next((reason for reason in reasons if reason is not None), None)

    return Condition(why_not, lambda key: all_words(conditions, key))


def all_words(conditions: tuple[Condition, ...], key: str) -> str:
    """Return the words of conditions that must all hold, for docs/config.md."""
    return ", and with ".join(words for condition in conditions if (words := condition.words(key)))


def micro_batches(switch: str, *, in_tokens: bool) -> Condition:
    """Return the condition that micro-batches are limited in tokens (dynamic), or else in samples.

    Args:
        switch: key that chooses between the two limits; its null means the actor's value.
        in_tokens: True for the limit in tokens.
    """
    return when(
        switch,
        in_tokens,
        null_means=f"{_ACTOR}use_dynamic_bsz",
        reason="without dynamic micro-batches" if in_tokens else "with dynamic micro-batches",
    )


def same_as(name: str) -> Condition:
    """Return the condition that the key has the same value as the key `name`."""
    return Condition(
        lambda run, key: None if run.value(key) == run.value(name) else f"with {name}={show(run.value(name))}",
        lambda key: f"the value of `{name}`",
    )


def _compare(
    expected: bool,
    name: str,
    values: tuple[Any, ...],
    at_least: float | None,
    null_means: str,
    reason: str,
    words: str,
) -> Condition:
    def why_not(run: Run, key: str) -> str | None:
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

    def in_words(key: str) -> str:
        return words or _comparison_words(expected, _full_name(name_in_words, key), values, at_least)

    name_in_words = name.replace("run.correction.", "algorithm.rollout_correction.")
    assert words or not name_in_words.startswith("run."), f"{name}: users do not know this fact, so give `words`"
    return Condition(why_not, in_words)


def _comparison_words(expected: bool, name: str, values: tuple[Any, ...], at_least: float | None) -> str:
    if at_least is not None:
        return f"`{name}` {'at least' if expected else 'below'} {at_least}"
    if not expected and isinstance(values[0], bool):
        return f"`{name}={not values[0]}`"
    if not expected:
        return f"`{name}` other than " + " or ".join(f"`{show(value)}`" for value in values)
    return f"`{name}={show(values[0])}`" + "".join(f" or `{show(value)}`" for value in values[1:])


def _readers(name: str, known: Mapping[str, Any], key: str) -> str:
    """Return the words for the estimators or losses in `known` that read `key`, a name as in their `reads`."""
    first, *others = (value for value, entry in known.items() if key in entry.reads)
    return f"`{name}={first}`" + "".join(f", `{other}`" for other in others) + " or your own"


def _full_name(name: str, key: str) -> str:
    return name if "." in name else f"{key.rpartition('.')[0]}.{name}"


def _fill(reason: str, run: Run, key: str) -> str:
    return re.sub(r"\{([^}]+)\}", lambda match: show(run.value(_full_name(match[1], key))), reason)


on_accelerator = Condition(
    lambda run, key: "on a CPU" if run.value("run.device") == "cpu" else None, lambda key: "an accelerator"
)
"""Condition of keys that have no effect on a CPU."""


has_own_memory = unless("run.device", "cpu", words="an accelerator", reason="on a CPU, which only has host memory")
"""Condition of keys that move tensors to host memory."""


validates = any_of(
    when("trainer.test_freq", at_least=1),
    when("trainer.val_before_train"),
    when("trainer.val_only"),
    reason="without validation (trainer.test_freq, trainer.val_before_train)",
    words="validation (`trainer.test_freq`, `trainer.val_before_train`, `trainer.val_only`)",
)
"""Condition of keys that only validation reads."""


def _why_not_quantization_aware(run: Run, key: str) -> str | None:
    section = key.rpartition(".")[0]
    enable, quantization = run.value(f"{section}.enable"), run.value("actor_rollout_ref.rollout.quantization")
    described = f"with {section.removeprefix('actor_rollout_ref.')}.enable={show(enable)}"
    if enable is False:
        return described
    known = quantization is None or quantization in SCHEME_NAMES
    if enable == "auto" and known and not weight_format_class(quantization).supports_qat:
        return f"{described} and rollout.quantization={show(quantization)}"
    return None


quantization_aware = Condition(
    _why_not_quantization_aware,
    lambda key: f"`{key.rpartition('.')[0]}.enable=True`, or `auto` and a rollout in MXFP8 or MXFP4",
)
"""Condition of keys that only quantization-aware training reads."""


def _why_not_read_by_estimator(run: Run, key: str) -> str | None:
    name = run.value("algorithm.adv_estimator")
    estimator = names.ADV_ESTIMATORS.get(name)
    if estimator is None or key.removeprefix("algorithm.") in estimator.reads:
        return None
    return f"with algorithm.adv_estimator={name}"


def _why_not_read_by_loss(run: Run, key: str) -> str | None:
    loss = names.POLICY_LOSSES.get(run.value("run.loss"))
    if loss is None or key.removeprefix(_ACTOR) in loss.reads:
        return None
    reason: str = run.value("run.loss_choice")
    return reason


read_by_estimator = Condition(
    _why_not_read_by_estimator,
    lambda key: _readers("algorithm.adv_estimator", names.ADV_ESTIMATORS, key.removeprefix("algorithm.")),
)
"""Condition of keys that only some estimators read; an estimator of the user may read any key."""

read_by_loss = Condition(
    _why_not_read_by_loss,
    lambda key: _readers(f"{_ACTOR}policy_loss.loss_mode", names.POLICY_LOSSES, key.removeprefix(_ACTOR)),
)
"""Condition of keys that only some policy losses read; a loss of the user may read any key."""
