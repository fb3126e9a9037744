import pytest

ENABLE = "async_training__enable"
ROLLOUT = "actor_rollout_ref__rollout__"
# Two local updates of four prompts in a step.
RUN = {
    ENABLE: True,
    "async_training__trigger_parameter_sync_step": 2,
    "async_training__staleness_threshold": 0.5,
    "data__train_batch_size": 0,
    "actor_rollout_ref__actor__ppo_mini_batch_size": 4,
    ROLLOUT + "nnodes": 1,
    ROLLOUT + "n_gpus_per_node": 1,
    "algorithm__rollout_correction__bypass_mode": True,
}


def test_a_fully_asynchronous_run_passes(plan_of):
    plan = plan_of(**RUN, rollout__total_rollout_steps=27)
    assert (plan.prompts_per_step, plan.total_steps, plan.warnings) == (8, 3, [])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({ROLLOUT + "nnodes": 0}, ("rollout.nnodes=0", "devices of their own", "rollout.nnodes=1")),
        ({ROLLOUT + "max_staleness": 1, "async_training__staleness_threshold": 1.5}, ("max_staleness=1", "at least")),
        ({"rollout__total_rollout_steps": 7}, ("total_rollout_steps=7", "takes 8 prompts", "at least 8")),
        ({"trainer__rollout_lag": 1}, ("rollout_lag=1 with async_training.enable=True", "one of the two")),
        (
            {"algorithm__filter_groups__enable": True, "algorithm__filter_groups__metric": "acc"},
            ("filter_groups.enable=True with async_training.enable=True",),
        ),
        ({"async_training__use_rollout_log_probs": False}, ("not supported", "bypass_mode=False")),
        ({"async_training__use_dynamic_resource_scheduling": True}, ("not supported",)),
        ({"async_training__use_trainer_do_validate": True}, ("not supported",)),
        ({"async_training__staleness_threshold": -0.5}, ("staleness_threshold=-0.5", "at least 0")),
        ({"async_training__require_batches": 0}, ("require_batches=0",)),
    ],
)
def test_invalid_settings_are_errors(problem_of, changes, words):
    problem = problem_of(**(RUN | changes))
    assert all(word in problem for word in words), problem


def test_a_mini_batch_that_does_not_divide_names_sizes_that_do(problem_of):
    sizes = {"actor_rollout_ref__actor__ppo_mini_batch_size": 5, "trainer__n_gpus_per_node": 3, ROLLOUT + "n": 4}
    text = problem_of(**RUN | sizes)
    assert text.startswith("actor_rollout_ref.actor.ppo_mini_batch_size=5: ") and text.endswith("use 3 or 6")


def test_no_staleness_is_synchronous_training_and_a_warning(plan_of):
    (warning,) = plan_of(**(RUN | {"async_training__staleness_threshold": 0})).warnings
    assert warning.startswith("async_training.staleness_threshold=0: synchronous training") and "0.5" in warning


def test_updates_that_wait_for_the_whole_step_are_a_note(plan_of):
    decoupled = RUN | {"algorithm__rollout_correction__bypass_mode": False}
    plan = plan_of(**decoupled, algorithm__rollout_correction__rollout_is="token")
    assert any("the 2 local updates of a step" in note for note in plan.notes)
    assert any(
        "async_training.enable=True without a rollout correction" in text for text in plan_of(**decoupled).warnings
    )


def test_without_the_run_the_section_is_unused(plan_of):
    notes = "\n".join(plan_of(async_training__require_batches=2, rollout__total_rollout_steps=80).notes)
    assert "no effect with async_training.enable=False: async_training.require_batches, rollout.total_ro" in notes


def test_fewer_prompts_than_a_step_are_an_error(problem_of):
    text = problem_of(**RUN | {"async_training__require_batches": 99}, trainer__total_epochs=1)
    assert text.startswith("trainer.total_epochs=1: data.train_files has ") and "takes 792" in text
