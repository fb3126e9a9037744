"""Partial rollouts: how many prompts may be under way, and what they do not go with."""

import pytest

KEY = "actor_rollout_ref__rollout__partial_rollout"
ON = {KEY: True, "data__gen_batch_size": 12}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({KEY: True}, ("data.gen_batch_size is not set", "train_batch_size=8", "at most 16")),
        ({KEY: True, "data__gen_batch_size": 8}, ("gen_batch_size=8", "use 9 to 16")),
        ({KEY: True, "data__gen_batch_size": 17}, ("gen_batch_size=17", "fit into the next step", "use 9 to 16")),
        (
            {**ON, "algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "acc"},
            ("filter_groups.enable=True", "not supported yet", "one of the two"),
        ),
        ({**ON, "actor_rollout_ref__rollout__max_staleness": 0}, ("max_staleness=0",)),
    ],
)
def test_what_cannot_work(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


def test_old_tokens_ask_for_a_correction(plan_of):
    (warning,) = [text for text in plan_of(**ON).warnings if "partial_rollout" in text]
    assert "rollout_is=token" in warning
    corrected = plan_of(**ON, algorithm__rollout_correction__rollout_is="token")
    assert not [text for text in corrected.warnings if "partial_rollout" in text]
    bypass = plan_of(**ON, algorithm__rollout_correction__bypass_mode=True)
    assert not [text for text in bypass.warnings if "partial_rollout" in text]


def test_the_bound_is_idle_without_them(plan_of):
    notes = "\n".join(plan_of(actor_rollout_ref__rollout__max_staleness=3).notes)
    assert "rollout.partial_rollout=False" in notes and "max_staleness" in notes
    assert "max_staleness" not in "\n".join(plan_of(**ON, actor_rollout_ref__rollout__max_staleness=3).notes)
