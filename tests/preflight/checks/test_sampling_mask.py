"""`rollout.replay_sampling_mask` with settings that it cannot work with."""

import pytest

R = "actor_rollout_ref__rollout__"
REPLAY = {R + "replay_sampling_mask": True, R + "top_k": 20, R + "top_p": 0.9}


def about_truncation(plan):
    return [text for text in (*plan.warnings, *plan.notes) if "top_p" in text or "replay" in text]


@pytest.mark.parametrize("changes", [{}, {R + "top_p": 1.0}, {R + "top_k": 1024}])
def test_a_bounded_truncation_is_accepted_without_a_warning(plan_of, changes):
    assert not about_truncation(plan_of(**REPLAY | changes))
    assert not about_truncation(plan_of(**REPLAY | changes, algorithm__rollout_correction__rollout_is="token"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({R + "top_p": 1.0, R + "top_k": -1}, "replay_sampling_mask=True with actor_rollout_ref.rollout.top_p=1 and"),
        ({R + "top_p": 1.0, R + "top_k": 0}, "samples from all tokens"),
        ({R + "top_k": -1}, "top_p=0.9 alone may keep the whole vocabulary"),
        ({R + "top_k": 1025}, "top_k=1025 with actor_rollout_ref.rollout.replay_sampling_mask=True"),
        ({R + "calculate_log_probs": False}, "the masks come with the log-probabilities"),
        ({R + "logprobs_mode": "raw_logprobs"}, "rollout.logprobs_mode=raw_logprobs with"),
        ({R + "engine_kwargs": "{vllm: {logprobs_mode: raw_logits}}"}, "engine_kwargs.vllm.logprobs_mode=raw_logits"),
        ({R + "engine_kwargs": "{vllm: {speculative_config: {method: ngram}}}"}, "proposes tokens from another"),
        ({R + "engine_kwargs": "{vllm: {max_logprobs: 20}}"}, "needs the log-probabilities of 46 tokens"),
    ],
)
def test_settings_without_right_masks_are_errors(problem_of, changes, expected):
    assert expected in problem_of(**REPLAY | changes)


@pytest.mark.parametrize("engine", ["{vllm: {max_logprobs: 46}}", "{vllm: {max_logprobs: -1}}"])
def test_the_engine_may_return_more_log_probabilities(plan_of, engine):
    """Does not raise."""
    plan_of(**REPLAY, **{R + "engine_kwargs": engine})


def test_old_log_probs_of_the_rollout_are_those_of_the_same_distribution(plan_of):
    """Does not raise."""
    plan_of(**REPLAY, actor_rollout_ref__actor__old_log_probs_from_rollout__enable=True)
