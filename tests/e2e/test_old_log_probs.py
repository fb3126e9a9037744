"""Runs whose `old_log_probs` come from the rollout, and runs whose guard switches rollout correction on."""

import pytest

from fixtures.training import TinyRun

pytestmark = pytest.mark.e2e

REUSE = "actor_rollout_ref__actor__old_log_probs_from_rollout__"
ROLLOUT = "actor_rollout_ref__rollout__"
QAT = "actor_rollout_ref__actor__fsdp_config__qat__enable"
QUANTIZED = {f"{ROLLOUT}quantization": "ascend", QAT: True}
SAME = (
    "actor/entropy",
    "actor/pg_loss",
    "actor/ppo_kl",
    "actor/grad_norm",
    "critic/score/mean",
    "response_length/mean",
)


def test_a_run_with_the_rollouts_values_trains_like_one_without(tmp_path, ray_address):
    """On two ranks, on policy: quantization-aware training in float32."""
    runs = {}
    for name, changes in (("computed", {}), ("reused", {f"{REUSE}enable": True})):
        run = runs[name] = TinyRun(tmp_path / name, ray_address, std=0.02)
        run.run(**run.seeded(), **QUANTIZED, **changes, trainer__n_gpus_per_node=2)
    expected, found = runs["computed"].metrics(), runs["reused"].metrics()
    for step in (1, 2):
        # 8 of 32 samples are compared.
        assert 0.5 < found[step]["rollout_corr/reused_fraction"] < 0.9
        assert found[step]["rollout_corr/checked_difference"] < 1e-4
        assert found[step]["rollout_corr/k3_kl"] == pytest.approx(found[step]["rollout_corr/checked_k3_kl"], rel=1e-6)
    # In step 2 the runs may sample other tokens: where a value of the new weights lies between two values of MXFP8, the
    # rounding of the log-probabilities decides.
    for metric in SAME:
        assert found[1][metric] == pytest.approx(expected[1][metric], rel=1e-3, abs=1e-5), metric


def test_a_guard_switches_correction_on_and_a_resumed_run_stops(tmp_path, ray_address):
    guard = f"{ROLLOUT}quantization_guard__"
    common = {f"{ROLLOUT}quantization": "ascend", QAT: False, f"{guard}max_k3_kl": 1e-9, "trainer__save_freq": 1}
    run = TinyRun(tmp_path, ray_address, std=0.02)
    text = run.run(**common, **{f"{guard}steps": 1, f"{guard}action": "correct"})
    assert "Rollout correction (decoupled_token_is) is on from step 2 on" in text
    first, second = (run.metrics()[step] for step in (1, 2))
    assert (first["rollout_corr/guard_steps_above"], second["rollout_corr/guard_steps_above"]) == (1, 2)
    assert "rollout_corr/rollout_is_mean" not in first
    assert second["rollout_corr/rollout_is_mean"] == pytest.approx(1, abs=0.05)
    text = run.run(
        status=1,
        **(common | {"trainer__save_freq": 10}),
        **{f"{guard}steps": 3, f"{guard}action": "stop", "trainer__total_training_steps": 5},
    )
    assert "QuantizationGuardError" in text and "was above it in 3 steps in a row" in text
    assert text.count("_proj") >= 5 and sorted(run.metrics()) == [1, 2, 3]
    assert (run.out / "global_step_3").is_dir()
