"""Checks of quantization-aware training: what disagrees with the engine is refused before the start."""

import pytest

from fixtures.tiny import write_tiny_model

ACTOR, REF = "actor_rollout_ref__actor__fsdp_config__qat__", "actor_rollout_ref__ref__fsdp_config__qat__"
QUANTIZATION = "actor_rollout_ref__rollout__quantization"


@pytest.fixture
def tiny(tmp_path):
    return {"actor_rollout_ref__model__path": write_tiny_model(tmp_path / "tiny")}


@pytest.fixture
def fp8(tmp_path):
    directory = write_tiny_model(tmp_path / "fp8", hidden_size=128, intermediate_size=128, head_dim=64)
    # A CPU without fast bfloat16 would choose float32, which this format does not take.
    return {
        QUANTIZATION: "fp8",
        "actor_rollout_ref__model__path": directory,
        "actor_rollout_ref__rollout__dtype": "bfloat16",
    }


@pytest.mark.parametrize(
    ("enable", "quantization", "mode"),
    [
        (False, "ascend", None),
        (True, "ascend", "as the engine"),
        ("auto", "ascend", "as the engine"),
        ("auto", "null", None),
    ],
)
def test_auto_follows_the_rollout(tiny, plan_of, enable, quantization, mode):
    plan = plan_of(**tiny, **{f"{ACTOR}enable": enable, QUANTIZATION: quantization})
    assert plan.qat == mode
    assert ("quantization-aware" in plan.render()) == (mode is not None)


def test_by_default_only_the_policy_follows_the_rollout(tiny, plan_of, fp8):
    common = {**tiny, "actor_rollout_ref__actor__use_kl_loss": True}
    for rollout, mode in (({QUANTIZATION: "ascend"}, "as the engine"), (fp8, None), ({}, None)):
        plan = plan_of(**{**common, **rollout})
        assert plan.qat == mode and not [note for note in plan.notes if "qat" in note]


def test_keys_without_effect_are_noted(tiny, plan_of, fp8):
    def notes(**keys):
        plan = plan_of(**{**tiny, **keys, f"{ACTOR}mask_saturated": True})
        return [note for note in plan.notes if "mask_saturated" in note]

    enable, ascend = "with actor.fsdp_config.qat.enable=", {QUANTIZATION: "ascend"}
    assert not notes(**ascend) and not notes(**ascend, **{f"{ACTOR}enable": True})
    for keys, reason in (
        ({}, f"{enable}auto and rollout.quantization=null"),
        (fp8, f"{enable}auto and rollout.quantization=fp8"),
        ({**ascend, f"{ACTOR}enable": False}, f"{enable}False"),
    ):
        [note] = notes(**keys)
        assert reason in note


@pytest.mark.parametrize("quantization", ["null", "fp8", "torchao"])
@pytest.mark.parametrize("prefix", [ACTOR, REF])
def test_a_rollout_without_numbers_to_train_on_is_refused(tiny, problems_of, prefix, quantization):
    field = prefix.replace("__", ".") + "enable=True: "
    problems = problems_of(**tiny, **{f"{prefix}enable": True, QUANTIZATION: quantization})
    [problem] = [problem for problem in problems if problem.startswith(field)]
    assert f"quantization={quantization} " in problem
    assert "set actor_rollout_ref.rollout.quantization=ascend" in problem


def test_the_critic_is_not_rounded(tiny, problem_of):
    problem = problem_of(**tiny, critic__fsdp__qat__enable=True, **{QUANTIZATION: "ascend"})
    assert problem.startswith("critic.fsdp.qat.enable=True: ")


@pytest.mark.parametrize("mode", ["w4a16", "w4a4", "int8", "w4a8_mxfp"])
def test_another_format_than_the_engines_is_refused(tiny, problem_of, mode):
    problem = problem_of(**tiny, **{f"{ACTOR}enable": True, f"{ACTOR}mode": mode, QUANTIZATION: "ascend"})
    assert f"qat.mode={mode}" in problem.replace("'", "")


@pytest.mark.parametrize("enable", [True, "auto"])
def test_dtypes_that_round_differently_are_refused(tiny, problem_of, enable):
    keys = {"actor_rollout_ref__actor__fsdp_config__dtype": "float32", "actor_rollout_ref__rollout__dtype": "bfloat16"}
    problem = problem_of(**tiny, **keys, **{f"{ACTOR}enable": enable, QUANTIZATION: "ascend"})
    assert f"fsdp_config.dtype=float32 with qat.enable={enable}: " in problem
    assert "actor_rollout_ref.rollout.dtype=bfloat16" in problem


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_by_default_the_trainer_computes_in_the_dtype_of_the_engine(tiny, plan_of, dtype):
    """On any CPU: one of the two is not the dtype that the CPU computes fast."""
    plan = plan_of(**tiny, **{QUANTIZATION: "ascend", "actor_rollout_ref__rollout__dtype": dtype})
    assert plan.compute_dtype == plan.rollout_dtype == dtype


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_proj", "matches model.layers.0.self_attn.q_proj, which the engine quantizes"),
        ("re:.*mlp", "matches model.layers.0.mlp"),
        ("lm_haed", "matches no layer"),
        ("re:(", "not a regular expression"),
    ],
)
def test_patterns_that_disagree_with_the_engine_are_refused(tiny, problem_of, pattern, words):
    keys = {f"{ACTOR}enable": True, f"{ACTOR}ignore_patterns": f"['{pattern}']", QUANTIZATION: "ascend"}
    problem = problem_of(**tiny, **keys)
    assert problem.startswith("actor_rollout_ref.actor.fsdp_config.qat.ignore_patterns: ") and words in problem


def test_a_layer_that_both_leave_out_may_be_ignored(tiny, plan_of, tmp_path):
    file = tmp_path / "ignore.json"
    file.write_text('{"ignore": ["re:.*o_proj"]}')
    keys = {f"{ACTOR}enable": True, f"{ACTOR}ignore_patterns": "[lm_head,o_proj]", QUANTIZATION: "ascend"}
    assert plan_of(**tiny, **keys, **{f"{QUANTIZATION}_config_file": file}).qat == "as the engine"


@pytest.mark.parametrize("mode", ["null", "w4a8_mxfp", "w8a8_mxfp8", "w8a16_mxfp8"])
def test_the_mode_must_be_that_of_the_layers(tiny, plan_of, problem_of, mode):
    keys = {f"{ACTOR}enable": True, f"{ACTOR}mode": mode, QUANTIZATION: "ascend", f"{QUANTIZATION}_scheme": "W4A8_MXFP"}
    if mode.startswith("w8"):
        problem = problem_of(**tiny, **keys)
        assert f"qat.mode={mode}: the engine holds layers in W4A8_MXFP; use null" in problem
    else:
        assert plan_of(**tiny, **keys).qat == {"null": "as the engine"}.get(mode, mode)
