"""`skip.rollout` with features that cached samples would make wrong."""

import pytest

from verl.config import load_config

SKIP = {"skip__rollout__enable": True, "skip__rollout__steps": "[1,2]"}
ROLLOUT = "actor_rollout_ref__rollout__"


def test_cached_rollouts_are_accepted(plan_of):
    plan = plan_of(**SKIP)
    assert not [text for text in (*plan.warnings, *plan.notes) if "skip" in text]


def test_the_section_of_the_other_trainer_of_upstream_is_the_same():
    config = load_config(["skip.rollout_tq.enable=True", "skip.rollout_tq.steps=[3]", "skip.rollout_tq.action=repeat"])
    assert (config.skip.rollout.enable, config.skip.rollout.steps, config.skip.rollout.action) == (True, [3], "repeat")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({ROLLOUT + "partial_rollout": True, "data__gen_batch_size": 12}, ("partial_rollout=True", "remove one")),
        ({ROLLOUT + "replay_sampling_mask": True, ROLLOUT + "top_k": 20}, ("replay_sampling_mask", "remove one")),
        (
            {
                "skip__rollout__action": "repeat",
                "algorithm__filter_groups__enable": True,
                "algorithm__filter_groups__metric": "acc",
            },
            ("action=repeat with algorithm.filter_groups.enable=True", "action=cache"),
        ),
        ({"skip__rollout__steps": "[0,1]"}, ("skip.rollout.steps", "at least 1")),
        ({"skip__rollout__action": "random"}, ("skip.rollout.action=random", "cache")),
    ],
)
def test_features_that_need_samples_of_this_run_are_errors(problem_of, changes, words):
    problem = problem_of(**SKIP | changes)
    assert all(word in problem for word in words), problem


def test_the_guard_of_a_quantized_rollout_is_an_error(problems_of):
    guarded = {ROLLOUT + "quantization": "ascend", ROLLOUT + "quantization_guard__max_k3_kl": 0.01}
    assert any("max_k3_kl=0.01: cached samples come from" in text for text in problems_of(**SKIP | guarded))


def test_no_step_is_a_warning(plan_of):
    assert any("skip.rollout.steps=[]" in text for text in plan_of(skip__rollout__enable=True).warnings)


def test_without_the_switch_the_section_is_unused(plan_of):
    assert any("skip.rollout.steps" in note for note in plan_of(skip__rollout__steps="[1]").notes)
