from verl.preflight import derive_plan

ROLLOUT = "actor_rollout_ref.rollout"


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
