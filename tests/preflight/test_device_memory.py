import pytest

GB = 10**9
MODEL, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.rollout"
WITHOUT_QAT = {"actor_rollout_ref.actor.fsdp_config.qat.enable": False}


def stages(plan):
    return {stage.name: stage for stage in plan.device_memory.stages}


def test_separate_replicas_and_trainer_use_no_memory_of_each_other(examine_on):
    separate = {f"{ROLLOUT}.nnodes": 1}
    shared, own = (stages(examine_on("Qwen3-8B", keys)[0]) for keys in ({}, separate))
    assert "state of the trainer" in shared["generation"].parts and "engine" in shared["actor update"].parts
    assert set(own["generation"].parts) == {"weights", "cache and graphs"}
    assert "engine" not in own["actor update"].parts


def test_an_engine_without_free_cache_engine_keeps_its_memory(examine_on):
    keys = {f"{ROLLOUT}.free_cache_engine": False, f"{ROLLOUT}.gpu_memory_utilization": 0.5}
    assert stages(examine_on("Qwen3-8B", keys)[0])["actor update"].parts["engine"] == 64 * GB
    _, found = examine_on("Qwen3-32B", keys)
    assert any("actor update needs" in text and "free_cache_engine=True" in text for text in found.errors)


def test_each_of_twice_as_many_ranks_holds_half_of_the_state(examine_on):
    one, two = (stages(examine_on("Qwen3-8B", {"trainer.n_gpus_per_node": n})[0]) for n in (8, 16))
    parts = one["actor update"].parts, two["actor update"].parts
    for name in ("state of the trainer", "gradients"):
        assert parts[0][name] == pytest.approx(2 * parts[1][name], rel=1e-6)


def test_with_lora_only_adapters_have_gradients_and_moments(examine_on):
    plain, lora = (
        stages(examine_on("Qwen3-8B", {f"{MODEL}.lora_rank": rank, **WITHOUT_QAT})[0])["actor update"]
        for rank in (0, 32)
    )
    assert lora.parts["gradients"] < plain.parts["gradients"] / 20
    assert lora.parts["state of the trainer"] == pytest.approx(plain.parts["state of the trainer"] / 3, rel=0.05)


def test_a_critic_adds_a_stage(examine_on):
    keys = {"algorithm.adv_estimator": "gae", "critic.model.path": "/models/Qwen3-8B"}
    with_critic, without = (stages(examine_on("Qwen3-8B", {**k, **WITHOUT_QAT})[0]) for k in (keys, {}))
    assert "critic update" in with_critic and "critic update" not in without
    state = [each["generation"].parts["state of the trainer"] for each in (with_critic, without)]
    assert state[0] == pytest.approx(2 * state[1], rel=1e-6)
