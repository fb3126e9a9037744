"""Conditions of a key's effect."""

import pytest

from verl.config.conditions import any_of, first_of, micro_batches, read_by_estimator, read_by_loss, unless, when

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
    assert condition.why_not(RUN, KEY) == reason


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (when("flag"), "`section.flag=True`"),
        (when("other.size", 1, 2), "`other.size=1` or `2`"),
        (when("size", at_least=3), "`section.size` at least 3"),
        (unless("size", at_least=3), "`section.size` below 3"),
        (unless("flag"), "`section.flag=False`"),
        (unless("open", None), "`section.open` other than `null`"),
        (unless("size", 1, 2), "`section.size` other than `1` or `2`"),
        (when("run.correction.bypass_mode"), "`algorithm.rollout_correction.bypass_mode=True`"),
        (when("run.user_loss", words="your own loss"), "your own loss"),
        (any_of(when("flag"), when("other.on", False)), "`section.flag=True` or `other.on=False`"),
        (any_of(when("flag"), when("other.on"), words="either of them"), "either of them"),
        (first_of(when("flag"), when("other.on")), "`section.flag=True`, and with `other.on=True`"),
        (micro_batches("dynamic", in_tokens=False), "`section.dynamic=False`"),
    ],
)
def test_words_of_a_condition(condition, words):
    assert condition.words(KEY) == words


def test_losses_and_estimators_that_read_a_key_are_listed():
    assert read_by_estimator.words("algorithm.gamma") == (
        "`algorithm.adv_estimator=gae`, `reinforce_plus_plus` or your own"
    )
    assert read_by_loss.words("actor_rollout_ref.actor.tau_pos") == (
        "`actor_rollout_ref.actor.policy_loss.loss_mode=sapo` or your own"
    )


def test_a_condition_on_a_fact_needs_words():
    with pytest.raises(AssertionError, match="give `words`"):
        when("run.user_loss")


def test_names_of_the_policy_section_are_shortened_in_reasons():
    run = Values({"actor_rollout_ref.actor.use_kl_loss": False})
    assert when("use_kl_loss").why_not(run, "actor_rollout_ref.actor.kl_loss_coef") == "with actor.use_kl_loss=False"
