"""Conditions of a key's effect."""

import pytest

from verl.config.conditions import any_of, first_of, unless, when

KEY = "section.key"


class Values(dict):
    """A run with these values."""

    def value(self, name):
        return self[name]


RUN = Values(
    {"section.flag": False, "section.size": 3, "section.parts": ["a", "b"], "section.open": None, "other.on": True}
)


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (when("flag"), "with section.flag=False"),
        (when("flag", False), None),
        (unless("flag"), None),
        (when("other.on"), None),
        (when("size", 1, 2), "with section.size=3"),
        (unless("size", 1, 2), None),
        (when("size", at_least=3), None),
        (when("size", at_least=4), "with section.size=3"),
        (when("open", at_least=4), "with section.open=null"),
        (when("open", True, null_means="other.on"), None),
        (when("parts", "b", "c"), None),
        (unless("parts", "b", "c"), "with section.parts=[a,b]"),
        (when("flag", reason="with {size} and {other.on}"), "with 3 and True"),
        (any_of(when("flag"), when("other.on")), None),
        (any_of(when("flag"), unless("other.on")), "with section.flag=False"),
        (any_of(when("flag"), unless("other.on"), reason="with neither"), "with neither"),
        (first_of(when("other.on"), when("flag")), "with section.flag=False"),
        (first_of(unless("size", 3), when("flag")), "with section.size=3"),
        (first_of(when("other.on"), when("size", 3)), None),
    ],
)
def test_reason_of_a_condition(condition, reason):
    assert condition(RUN, KEY) == reason


def test_names_of_the_policy_section_are_shortened_in_reasons():
    run = Values({"actor_rollout_ref.actor.use_kl_loss": False})
    assert when("use_kl_loss")(run, "actor_rollout_ref.actor.kl_loss_coef") == "with actor.use_kl_loss=False"
