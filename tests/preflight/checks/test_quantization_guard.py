"""Checks of `rollout.quantization_guard`: guards that could not measure or not act are refused before the start."""

import pytest

from fixtures.tiny import write_tiny_model

R, C = "actor_rollout_ref__rollout__", "algorithm__rollout_correction__"
GUARD = f"{R}quantization_guard__"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def guarded(tiny):
    return {
        "actor_rollout_ref__model__path": tiny,
        f"{R}quantization": "ascend",
        f"{GUARD}max_k3_kl": 0.01,
        "trainer__save_freq": 5,
    }


def warnings_of(plan):
    return [warning for warning in plan.warnings if "quantization_guard" in warning]


@pytest.mark.parametrize("action", ["stop", "correct"])
def test_a_guard_of_a_quantized_rollout_is_accepted(guarded, plan_of, action):
    assert not warnings_of(plan_of(**guarded, **{f"{GUARD}action": action}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{R}quantization": "null"}, ("max_k3_kl=0.01: the rollout is not quantized",)),
        ({f"{R}calculate_log_probs": False}, ("calculate_log_probs=False with ", "max_k3_kl=0.01", "set it to True")),
        ({f"{GUARD}max_k3_kl": 0}, ("max_k3_kl=0", "above 0")),
        ({f"{GUARD}max_k3_kl": -1}, ("max_k3_kl=-1", "above 0")),
        ({f"{GUARD}steps": 0}, ("steps=0", "at least 1")),
        ({f"{GUARD}action": "halt"}, ("action=halt", "unknown", "stop, correct")),
        (
            {f"{GUARD}action": "raise_precision"},
            ("raise_precision is not supported", "cannot hold a quantized layer in BF16", "--budget"),
        ),
        (
            {f"{GUARD}action": "correct", f"{C}preset": "decoupled_token_is"},
            ("action=correct: rollout correction is on from the start", "action=stop"),
        ),
        (
            {f"{GUARD}action": "correct", f"{C}rollout_rs": "token_k3", f"{C}rollout_rs_threshold": 0.1},
            ("action=correct: rollout correction is on from the start",),
        ),
        (
            {f"{GUARD}action": "correct", f"{C}bypass_mode": True},
            ("action=correct with algorithm.rollout_correction.bypass_mode=True", "action=stop"),
        ),
    ],
)
def test_a_guard_that_cannot_work_is_refused(guarded, problem_of, changes, words):
    problem = problem_of(**(guarded | changes))
    assert problem.startswith("actor_rollout_ref.rollout.") and all(word in problem for word in words), problem


@pytest.mark.parametrize("changes", [{f"{C}preset": "decoupled_token_is"}, {f"{C}bypass_mode": True}])
def test_a_run_with_correction_can_be_stopped(guarded, plan_of, changes):
    assert not warnings_of(plan_of(**guarded, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainer__rollout_lag": 1}, "with trainer.rollout_lag=1: tokens from older weights add to the mismatch"),
        ({"trainer__save_freq": -1}, "action=stop with trainer.save_freq=-1: the run would stop without a checkpoint"),
        ({f"{GUARD}action": "correct", f"{R}top_p": 0.9}, "quantization_guard.action=correct"),
    ],
)
def test_a_guard_that_works_less_well_is_a_warning(guarded, plan_of, changes, words):
    (warning,) = warnings_of(plan_of(**(guarded | changes)))
    assert words in warning


def test_other_keys_without_a_limit_have_no_effect(guarded, plan_of):
    plan = plan_of(**(guarded | {f"{GUARD}max_k3_kl": "null", f"{GUARD}steps": 5}))
    assert any("no effect" in note and "quantization_guard.steps" in note for note in plan.notes)
