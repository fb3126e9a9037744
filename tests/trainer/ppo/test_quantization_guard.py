"""The guard of a quantized rollout: when it acts, what it says, and what a resumed run knows."""

import logging

import pytest

from verl.config.quantization_guard import QuantizationGuardConfig
from verl.config.rollout_correction import Band, Correction
from verl.trainer.ppo.quantization_guard import (
    QuantizationGuard,
    QuantizationGuardError,
    restore_guard,
    worst_layers,
)

OUTPUTS = {
    "model.layers.2.self_attn.q_proj.weight": [25.0, 100.0],
    "model.layers.0.mlp.down_proj.weight": [0.0009, 1.0],
    "model.layers.1.mlp.down_proj.weight": [0.0004, 4.0],
    "model.layers.2.mlp.down_proj.weight": [0.0016, 1.0],
    "lm_head.weight": [0.04, 1.0],
    "model.layers.3.mlp.down_proj.weight": [0.0036, 1.0],
}
WEIGHTS = {
    "self_attn.q_proj": [0.026, 0.027, 0.5],
    "mlp.down_proj": [0.03, None, 0.04],
    "lm_head.weight": [0.2],
}


def guard(**settings):
    return QuantizationGuard(QuantizationGuardConfig(**({"max_k3_kl": 0.01, "steps": 2} | settings)))


def run(guarded, *k3_kls, first=1):
    """Show these steps to a guard, as the training loop does; return the metrics of the last one."""
    for step, k3_kl in enumerate(k3_kls, first):
        metrics = {"rollout_corr/k3_kl": k3_kl, "weight_update/quantization_errors": WEIGHTS, "actor/lr": 1.0}
        if guarded.observe(metrics):
            guarded.act(step, metrics, OUTPUTS)
    return guarded.metrics()


def test_steps_in_a_row_above_the_limit_are_counted():
    guarded = guard(steps=3)
    counts = [run(guarded, k3_kl)["rollout_corr/guard_steps_above"] for k3_kl in (0.02, 0.01, 0.02, 0.02)]
    assert counts == [1, 0, 1, 2] and guarded.error is None
    assert not guarded.observe({"actor/lr": 1.0}) and guarded.metrics() == {"rollout_corr/guard_steps_above": 2.0}
    assert run(guarded, 0.011)["rollout_corr/guard_steps_above"] == 3
    assert isinstance(guarded.error, QuantizationGuardError)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mismatch_that_is_not_finite_is_above_the_limit(value):
    guarded = guard()
    run(guarded, value, value)
    assert guarded.error is not None


def test_the_error_names_limit_steps_and_the_worst_layers():
    guarded = guard()
    run(guarded, 0.02, 0.034, first=6)
    text = str(guarded.error)
    assert "actor_rollout_ref.rollout.quantization_guard.max_k3_kl=0.01: rollout_corr/k3_kl was above it in 2 " in text
    assert (
        "0.034 in step 7" in text
        and "  0.5      model.layers.2.self_attn.q_proj.weight\n  0.2      lm_head.weight" in text
    )
    assert "qat.enable=True" in text and "quantization_config_file" in text and "preset=decoupled_token_is" in text


def test_the_table_has_the_five_largest_errors():
    title, *lines = worst_layers(OUTPUTS, WEIGHTS).splitlines()
    assert "errors in their outputs" in title
    assert [line.split() for line in lines] == [
        ["0.5", "model.layers.2.self_attn.q_proj.weight"],
        ["0.2", "lm_head.weight"],
        ["0.06", "model.layers.3.mlp.down_proj.weight"],
        ["0.04", "model.layers.2.mlp.down_proj.weight"],
        ["0.03", "model.layers.0.mlp.down_proj.weight"],
    ]
    assert "lm_head" in worst_layers(OUTPUTS | {"lm_head.weight": [float("nan"), 1.0]}).splitlines()[1]


def test_without_errors_of_outputs_the_table_has_those_of_weights():
    title, *lines = worst_layers({}, WEIGHTS).splitlines()
    assert "rounding errors of their weights" in title
    assert [line.split() for line in lines] == [
        ["0.5", "layers.2.self_attn.q_proj"],
        ["0.2", "lm_head.weight"],
        ["0.04", "layers.2.mlp.down_proj"],
        ["0.03", "layers.0.mlp.down_proj"],
        ["0.027", "layers.1.self_attn.q_proj"],
    ]
    assert "lm_head" in worst_layers({}, WEIGHTS | {"lm_head.weight": [float("nan")]}).splitlines()[1]
    assert "unknown" in worst_layers({}, None) and "unknown" in worst_layers({}, {})


def test_correction_is_switched_on_once(caplog):
    configured = Correction()
    guarded = guard(action="correct")
    assert run(guarded, 0.02)["rollout_corr/guard_correcting"] == 0
    assert guarded.correction(configured) is configured
    with caplog.at_level(logging.WARNING):
        assert run(guarded, 0.02, 0.02, first=2)["rollout_corr/guard_correcting"] == 1
    (record,) = caplog.records
    assert "decoupled_token_is" in record.message and "on from step 3 on" in record.message
    assert "layers.2.self_attn.q_proj" in record.message
    assert guarded.error is None
    switched = guarded.correction(configured)
    assert (switched.rollout_is, switched.rollout_is_band, switched.rejections) == ("token", Band(0.5, 2.0), ())
    run(guarded, 0.001)
    assert guarded.correction(configured) == switched, "it stays on"


def test_a_resumed_run_goes_on_counting_and_correcting(caplog):
    guarded = guard()
    run(guarded, 0.02)
    resumed = guard()
    restore_guard(resumed, guarded.state)
    run(resumed, 0.02, first=2)
    assert resumed.error is not None

    guarded = guard(action="correct")
    run(guarded, 0.02, 0.02)
    resumed = guard(action="correct")
    caplog.clear()
    restore_guard(resumed, guarded.state)
    assert resumed.correction(Correction()).rollout_is == "token" and not caplog.records


@pytest.mark.parametrize("resumed", [None, guard()])
def test_a_correction_that_a_resumed_run_drops_is_a_warning(caplog, resumed):
    with caplog.at_level(logging.WARNING):
        restore_guard(resumed, {"steps_above": 1, "correcting": True})
    assert "set algorithm.rollout_correction.preset=decoupled_token_is" in caplog.text
    assert resumed is None or not resumed.correcting
    caplog.clear()
    restore_guard(resumed, {"steps_above": 1, "correcting": False})
    restore_guard(resumed, None)
    assert not caplog.records
