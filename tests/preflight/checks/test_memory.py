import re

import pytest

from verl.preflight import derive_plan
from verl.preflight.checks.memory import check_host_memory
from verl.preflight.device_memory import ACTIVATIONS
from verl.preflight.estimate import MemoryEstimate
from verl.preflight.findings import Findings
from verl.utils.byte_size import GIB

ROLLOUT = "actor_rollout_ref.rollout"
A, C = "actor_rollout_ref.actor.fsdp_config", "critic.fsdp"
ONE_LONG_SAMPLE = {
    "trainer.device": "auto",
    f"{ROLLOUT}.quantization": "null",
    "trainer.nnodes": 2,
    "data.max_prompt_length": 1024,
    "data.max_response_length": 39936,
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 40960,
}


def test_too_little_host_memory_is_a_warning(plan_of, monkeypatch):
    monkeypatch.setattr(derive_plan, "available_memory_bytes", lambda: 1 << 30)
    (warning,) = plan_of().warnings
    assert "1.0 GiB are available" in warning
    monkeypatch.setattr(derive_plan, "available_memory_bytes", lambda: None)
    assert plan_of().warnings == []


def test_the_utilization_that_an_error_suggests_has_no_error(examine_on):
    _, found = examine_on("Qwen3-32B", {f"{ROLLOUT}.gpu_memory_utilization": 0.8})
    (error,) = (text for text in found.errors if text.startswith("generation needs"))
    lower = error.partition("gpu_memory_utilization=")[2].split()[0]
    _, found = examine_on("Qwen3-32B", {f"{ROLLOUT}.gpu_memory_utilization": lower})
    assert not [text for text in (*found.errors, *found.warnings) if text.startswith("generation")]


def test_a_model_too_large_for_all_ranks_is_an_error(examine_on):
    _, found = examine_on("Qwen3-235B-A22B", {f"{ROLLOUT}.quantization": "null"})
    assert any("actor update needs" in text and "raise trainer.n_gpus_per_node" in text for text in found.errors)


def test_logits_that_do_not_fit_have_a_smaller_head_as_the_way_out(examine_on):
    changes = {
        "actor_rollout_ref.actor.use_dynamic_bsz": True,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 131_072,
        "data.max_response_length": 16_384,
    }
    fused = "actor_rollout_ref.model.use_fused_kernels"
    _, found = examine_on("Qwen3-8B", changes | {fused: False})
    assert any("actor update needs" in text and f"set {fused}=null" in text for text in found.errors)
    _, found = examine_on("Qwen3-8B", changes)
    assert not any("actor update needs" in text for text in found.errors)


def test_a_sample_that_does_not_fit_is_shared_by_ranks(examine_on):
    """The suggestion halves the memory of the activations, and then the update fits."""
    actor, longest = "actor_rollout_ref.actor", 262_144
    limit, size = f"{actor}.ppo_max_token_len_per_gpu", f"{actor}.ulysses_sequence_parallel_size"
    lengths = {"data.max_prompt_length": 1024, "data.max_response_length": longest - 1024}
    keys = {f"{actor}.use_dynamic_bsz": True, limit: longest, **lengths}
    plan, found = examine_on("Qwen3-30B-A3B-Instruct-2507", keys)
    (error,) = (text for text in found.errors if "actor update needs" in text)
    assert f"lower {limit}={longest}, and set {size}=2, so that 2 ranks share each sample" in error
    shared, found = examine_on("Qwen3-30B-A3B-Instruct-2507", keys | {limit: longest // 2, size: 2})
    assert not found.errors
    before, after = (
        stage.parts[ACTIVATIONS]
        for each in (plan, shared)
        for stage in each.device_memory.stages
        if stage.name == "actor update"
    )
    assert before / 2 < after < before / 2 * 1.01  # the tiles of the logits do not shrink


def suggested(text):
    """Return the values of keys that an error suggests, with their sizes."""
    return dict(pair.split("=") for pair in re.search(r".*set ([^:]*): then about", text)[1].split(" and "))


def needs(found, stage):
    return [text for text in (*found.errors, *found.warnings) if text.startswith(f"{stage} needs")]


@pytest.mark.parametrize(
    ("keys", "stage", "expected"),
    [
        ({f"{A}.fsdp_size": 1}, "actor update", {f"{A}.fsdp_size": "-1"}),
        ({f"{A}.reshard_after_forward": False}, "actor update", {f"{A}.reshard_after_forward": "True"}),
        ({}, "generation", {f"{A}.optimizer_offload": "True"}),
        (
            {"actor_rollout_ref.actor.use_kl_loss": True, f"{ROLLOUT}.gpu_memory_utilization": 0.5},
            "generation",
            {"actor_rollout_ref.ref.fsdp_config.param_offload": "True"},
        ),
        (
            {"algorithm.adv_estimator": "gae", "critic.model.path": "/models/Qwen3-32B"},
            "generation",
            {f"{A}.optimizer_offload": "True", f"{C}.optimizer_offload": "True"},
        ),
        (
            {"trainer.n_gpus_per_node": 4, f"{ROLLOUT}.gpu_memory_utilization": 0.7},
            "generation",
            {f"{A}.optimizer_offload": "True", f"{A}.param_offload": "True"},
        ),
        ({"trainer.n_gpus_per_node": 2}, "actor update", {f"{A}.offload_policy": "True"}),
        (
            ONE_LONG_SAMPLE | {"actor_rollout_ref.model.use_fused_kernels": False},
            "actor update",
            {
                "actor_rollout_ref.model.use_fused_kernels": "null",
                "actor_rollout_ref.model.enable_activation_offload": "True",
            },
        ),
        (
            ONE_LONG_SAMPLE,
            "actor update",
            {"actor_rollout_ref.model.enable_activation_offload": "True"},
        ),
    ],
)
def test_a_stage_fits_with_the_feature_that_an_error_names(examine_on, keys, stage, expected):
    keys = {f"{ROLLOUT}.gpu_memory_utilization": 0.6, **keys}
    name = "cuda:h100" if keys.get("trainer.nnodes") else "npu:ascend950"
    _, found = examine_on("Qwen3-32B", keys, name)
    (text,) = needs(found, stage)
    assert suggested(text) == expected
    plan, found = examine_on("Qwen3-32B", keys | expected, name)
    assert not needs(found, stage)
    total = next(each.total for each in plan.device_memory.stages if each.name == stage)
    assert f"then about {total / 1e9:.1f} GB of the device" in text
    if plan.memory.offloaded_bytes:
        ranks = keys.get("trainer.n_gpus_per_node", 8)
        assert f"and {plan.memory.offloaded_bytes * ranks / 1e9:.1f} GB of host memory for the {ranks} ranks" in text


def test_offloading_to_too_little_host_memory_is_an_error():
    estimate = MemoryEstimate(12 * GIB, 2 * GIB, 0, 1 * GIB, 4, 1, 51 * GIB, offloaded_bytes=11 * GIB)
    found = Findings()
    check_host_memory(estimate, 51 * GIB, found)
    check_host_memory(estimate, None, found)
    assert (found.errors, found.warnings) == ([], [])
    check_host_memory(estimate, 40 * GIB, found)
    (error,) = found.errors
    assert "needs about 44.0 GiB for 4 rank(s) of a node, and 33.0 GiB of 40.0 GiB of host memory are left" in error
    assert found.warnings == []
