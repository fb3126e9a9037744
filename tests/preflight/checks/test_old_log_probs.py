"""Checks of `actor.old_log_probs_from_rollout`: runs in which the rollout's values would be wrong are refused."""

import pytest

from fixtures.tiny import write_tiny_model

A, R, C = "actor_rollout_ref__actor__", "actor_rollout_ref__rollout__", "algorithm__rollout_correction__"
REUSE = f"{A}old_log_probs_from_rollout__"
QAT = f"{A}fsdp_config__qat__"
QUANTIZED = {f"{R}quantization": "ascend", f"{QAT}enable": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def reusing(tiny):
    return {"actor_rollout_ref__model__path": tiny, f"{REUSE}enable": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        QUANTIZED,
        QUANTIZED | {f"{QAT}enable": "auto"},
        {f"{R}temperature": 0.7},
        {f"{R}logprobs_mode": "raw_logprobs"},
        {f"{A}use_kl_loss": True},
        QUANTIZED | {f"{R}quantization_guard__max_k3_kl": 0.1},
        {"algorithm__adv_estimator": "gae"},
    ],
)
def test_a_run_whose_values_agree_is_accepted(reusing, plan_of, changes):
    """Does not raise."""
    plan_of(**reusing, critic__model__path=reusing["actor_rollout_ref__model__path"], **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{R}calculate_log_probs": False}, "calculate_log_probs=False: the engine returns no values"),
        ({"trainer__rollout_lag": 1}, "trainer.rollout_lag=1: older weights generate every sample"),
        ({f"{R}quantization": "ascend", f"{QAT}enable": False}, "qat.enable=False: the engine samples from another"),
        (QUANTIZED | {f"{QAT}mode": "w8a16_mxfp8"}, "qat.mode=w8a16_mxfp8: only the engine rounds the inputs"),
        ({f"{R}temperature": 0.7, f"{R}logprobs_mode": "raw_logprobs"}, "logprobs_mode=raw_logprobs and "),
        (
            {f"{R}temperature": 0.7, f"{R}engine_kwargs": "{vllm: {logprobs_mode: raw_logprobs}}"},
            "logprobs_mode=raw_logprobs and ",
        ),
        ({f"{R}top_p": 0.9}, "top_p=0.9: the engine's values are those of a part of the tokens"),
        ({f"{R}top_k": 20}, "top_k=20: the engine's values are those of a part of the tokens"),
        ({f"{C}bypass_mode": True}, "bypass_mode=True: bypass mode takes all values"),
        ({f"{C}rollout_is": "token"}, "rollout_is or rollout_rs: the correction compares"),
        ({f"{C}rollout_rs": "token_k3", f"{C}rollout_rs_threshold": 0.1}, "rollout_is or rollout_rs: "),
        (
            QUANTIZED | {f"{R}quantization_guard__max_k3_kl": 0.1, f"{R}quantization_guard__action": "correct"},
            "quantization_guard.action=correct: the correction would compare",
        ),
        ({"algorithm__use_kl_in_reward": True}, "use_kl_in_reward=True: the penalty would contain"),
        ({"algorithm__adv_estimator": "optimal_token_baseline"}, "sums of squared probabilities"),
    ],
)
def test_a_run_whose_values_differ_or_are_needed_is_refused(reusing, problem_of, changes, words):
    problem = problem_of(**reusing, **changes)
    assert problem.startswith("actor_rollout_ref.actor.old_log_probs_from_rollout.enable=True with ")
    assert words in problem and problem.endswith(", or actor_rollout_ref.actor.old_log_probs_from_rollout.enable=False")


@pytest.mark.parametrize("quantization", ["fp8", "torchao"])
def test_a_format_without_quantization_aware_training_is_refused(reusing, problems_of, quantization):
    problems = problems_of(**reusing, **{f"{R}quantization": quantization})
    assert any(f"quantization={quantization}: the engine samples from another policy" in text for text in problems)


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        ("sample_fraction", 0, "above 0"),
        ("sample_fraction", 1, "below 1"),
        ("min_samples", 0, "at least 1"),
        ("max_difference", 0, "above 0"),
        ("max_k3_kl", -1, "above 0"),
    ],
)
def test_values_out_of_bounds_are_refused(reusing, problem_of, key, value, bound):
    assert bound in problem_of(**reusing, **{REUSE + key: value})
