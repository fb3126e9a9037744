import pytest

C = "algorithm__rollout_correction__"
R = "actor_rollout_ref__rollout__"
LOSS = "actor_rollout_ref__actor__policy_loss__loss_mode"


def warnings_of(plan):
    return [
        warning for warning in plan.warnings if "logprobs_mode" in warning or "top_" in warning or "bypass" in warning
    ]


def notes_of(plan):
    return [note for note in plan.notes if "on a CPU" not in note]


@pytest.mark.parametrize("preset", ["disabled", "decoupled_seq_is_rs", "bypass_ppo_clip_k3_rs", "bypass_pg_is"])
def test_presets_have_no_warning(plan_of, preset):
    plan = plan_of(**{C + "preset": preset})
    assert not warnings_of(plan) and not notes_of(plan)


def test_invalid_keys_are_errors(problems_of):
    found = problems_of(
        **{C + "rollout_is": "tokens", C + "rollout_is_threshold": "5.0_0.5", C + "rollout_rs_threshold": 2}
    )
    assert len(found) == 3 and all(problem.startswith("algorithm.rollout_correction.") for problem in found)


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({C + "preset": "decoupled_token_is"}, "rollout_is or"),
        ({C + "rollout_rs": "token_k3", C + "rollout_rs_threshold": 0.1}, "rollout_is or"),
        ({C + "bypass_mode": True}, "bypass_mode=True"),
    ],
)
def test_a_correction_without_log_probs_is_an_error(problem_of, changes, asked):
    text = problem_of(**changes, **{R + "calculate_log_probs": False})
    assert text.startswith("actor_rollout_ref.rollout.calculate_log_probs=False: algorithm.rollout_correction.")
    assert asked in text and text.endswith("set it to True")


def test_no_correction_needs_no_log_probs(plan_of):
    """Does not raise."""
    plan_of(**{R + "calculate_log_probs": False, C + "preset": "disabled"})


def test_raw_log_probs_of_a_changed_distribution_are_a_warning(plan_of):
    raw = {R + "logprobs_mode": "raw_logprobs"}
    asked = {C + "rollout_is": "token"}
    assert not warnings_of(plan_of(**raw, **asked))
    assert not warnings_of(plan_of(**raw, **{R + "temperature": 0.7}))
    for key, value in (("temperature", 0.7), ("top_p", 0.9), ("top_k", 20)):
        (warning,) = warnings_of(plan_of(**raw, **asked, **{R + key: value}))
        assert f"logprobs_mode=raw_logprobs with actor_rollout_ref.rollout.{key}={value}" in warning
        assert "use actor_rollout_ref.rollout.logprobs_mode=processed_logprobs" in warning


def test_engine_kwargs_override_logprobs_mode(plan_of):
    engine = {R + "engine_kwargs": "{vllm: {logprobs_mode: raw_logprobs}}", R + "temperature": 0.7}
    (warning,) = warnings_of(plan_of(**engine, **{C + "bypass_mode": True}))
    assert "logprobs_mode=raw_logprobs" in warning


def test_processed_log_probs_of_a_part_of_the_tokens_are_a_warning(plan_of):
    asked = {C + "preset": "decoupled_geo_rs"}
    assert not warnings_of(plan_of(**asked, **{R + "temperature": 0.7}))
    for key, value in (("top_p", 0.9), ("top_k", 20)):
        (warning,) = warnings_of(plan_of(**asked, **{R + key: value}))
        assert f"{key}={value}" in warning and "below 1" in warning


@pytest.mark.parametrize(("key", "value"), [("top_p", 0.9), ("top_k", 20)])
def test_a_truncation_that_the_trainer_does_not_know_is_a_note(plan_of, key, value):
    (note,) = notes_of(plan_of(**{R + key: value}))
    assert f"{key}={value}: the engine samples from the most likely tokens only" in note
    assert "set actor_rollout_ref.rollout.replay_sampling_mask=True" in note


@pytest.mark.parametrize("loss_mode", ["vanilla", "bypass_mode"])
def test_bypass_mode_accepts_the_default_loss_and_its_own(plan_of, loss_mode):
    """Does not raise."""
    plan_of(**{C + "bypass_mode": True, LOSS: loss_mode})


def test_bypass_mode_with_another_loss_is_an_error(problem_of):
    text = problem_of(**{C + "bypass_mode": True, LOSS: "gspo"})
    assert text.startswith("actor_rollout_ref.actor.policy_loss.loss_mode=gspo with ")
    assert "algorithm.rollout_correction.bypass_mode=True" in text and "loss_type=ppo_clip" in text


def test_the_loss_bypass_mode_without_bypass_mode_is_an_error(problem_of):
    text = problem_of(**{LOSS: "bypass_mode"})
    assert "loss_mode=bypass_mode with algorithm.rollout_correction.bypass_mode=False" in text


def test_batch_normalize_with_reinforce_is_an_error(problem_of, plan_of):
    keys = {C + "rollout_is": "sequence", C + "rollout_is_batch_normalize": True}
    plan_of(**keys)
    text = problem_of(**keys, **{C + "bypass_mode": True, C + "loss_type": "reinforce"})
    assert text.startswith("algorithm.rollout_correction.rollout_is_batch_normalize=True with ")
    assert "loss_type=reinforce" in text and "bypass_mode=False" in text


def test_importance_weights_with_ppo_clip_are_only_metrics(plan_of):
    plan = plan_of(**{C + "rollout_is": "token", C + "bypass_mode": True})
    (note,) = notes_of(plan)
    assert note.startswith("algorithm.rollout_correction.rollout_is=token: only its metrics")


@pytest.mark.parametrize("estimator", ["optimal_token_baseline", "tir_optimal_token_baseline"])
def test_an_estimator_that_needs_the_skipped_forward_pass_is_an_error(problem_of, estimator):
    text = problem_of(**{C + "bypass_mode": True, "algorithm__adv_estimator": estimator})
    assert text.startswith(f"algorithm.adv_estimator={estimator} with algorithm.rollout_correction.bypass_mode=True")


def test_a_kl_penalty_on_log_probs_of_the_engine_is_a_warning(plan_of):
    (warning,) = warnings_of(plan_of(**{C + "bypass_mode": True, "algorithm__use_kl_in_reward": True}))
    assert warning.startswith("algorithm.use_kl_in_reward=True with ")


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({C + "rollout_is_threshold": 3.0}, C + "rollout_is_threshold"),
        ({C + "rollout_is_batch_normalize": True}, C + "rollout_is_batch_normalize"),
        ({C + "loss_type": "reinforce"}, C + "loss_type"),
        (
            {C + "bypass_mode": True, R + "log_prob_micro_batch_size_per_gpu": 1},
            R + "log_prob_micro_batch_size_per_gpu",
        ),
        (
            {C + "preset": "bypass_pg_is", "actor_rollout_ref__actor__clip_ratio_c": 4.0},
            "actor_rollout_ref__actor__clip_ratio_c",
        ),
    ],
)
def test_unused_keys_are_notes(plan_of, changes, unused):
    (note,) = notes_of(plan_of(**changes))
    assert note.startswith("no effect ") and note.endswith(unused.replace("__", "."))
