"""A run that is planned for hardware that is not here."""

import pytest

from fixtures.script import Script
from verl.config import load_config
from verl.preflight.check import examine
from verl.preflight.target import HARDWARE, Hardware, Scope

GB = 10**9
MODEL, ROLLOUT, ACTOR = "actor_rollout_ref.model", "actor_rollout_ref.rollout", "actor_rollout_ref.actor"

APART = {f"{ROLLOUT}.nnodes": 1, f"{ROLLOUT}.checkpoint_engine.backend": "hccl"}


@pytest.fixture
def of(tmp_path):
    """Plan and findings of a public model's run."""
    script = Script(tmp_path)

    def run(model, keys=(), name="npu:ascend950", nodes=None):
        given = script.keys | {f"{MODEL}.path": f"/models/{model}"} | dict(keys)
        config = load_config([f"{key}={value}" for key, value in given.items()])
        return examine(config, Scope(starting=False, hardware=Hardware(name, nodes), without_files=True))

    return run


def stages(plan):
    return {stage.name: stage for stage in plan.device_memory.stages}


def test_replicas_of_their_own_leave_the_trainers_devices_alone(of):
    apart = {f"{ROLLOUT}.nnodes": 1}
    shared, own = (stages(of("Qwen3-8B", keys)[0]) for keys in ({}, apart))
    assert "state of the trainer" in shared["generation"].parts and "engine" in shared["actor update"].parts
    assert set(own["generation"].parts) == {"weights", "cache and graphs"}
    assert "engine" not in own["actor update"].parts


def test_an_engine_that_keeps_its_memory(of):
    keys = {f"{ROLLOUT}.free_cache_engine": False, f"{ROLLOUT}.gpu_memory_utilization": 0.5}
    assert stages(of("Qwen3-8B", keys)[0])["actor update"].parts["engine"] == 64 * GB
    _, found = of("Qwen3-32B", keys)
    assert any("actor update takes" in text and "free_cache_engine=True" in text for text in found.errors)


def test_twice_the_ranks_hold_half_each(of):
    one, two = (stages(of("Qwen3-8B", {"trainer.n_gpus_per_node": n})[0]) for n in (8, 16))
    parts = one["actor update"].parts, two["actor update"].parts
    for name in ("state of the trainer", "gradients"):
        assert parts[0][name] == pytest.approx(2 * parts[1][name], rel=1e-6)


def test_adapters_have_neither_gradients_nor_moments_of_the_model(of):
    plain, lora = (stages(of("Qwen3-8B", {f"{MODEL}.lora_rank": rank})[0])["actor update"] for rank in (0, 32))
    assert lora.parts["gradients"] < plain.parts["gradients"] / 20
    assert lora.parts["state of the trainer"] == pytest.approx(plain.parts["state of the trainer"] / 3, rel=0.05)


def test_a_critic_has_a_stage_of_its_own(of):
    keys = {"algorithm.adv_estimator": "gae", "critic.model.path": "/models/Qwen3-8B"}
    with_critic, without = stages(of("Qwen3-8B", keys)[0]), stages(of("Qwen3-8B")[0])
    assert "critic update" in with_critic and "critic update" not in without
    state = [each["generation"].parts["state of the trainer"] for each in (with_critic, without)]
    assert state[0] == pytest.approx(2 * state[1], rel=1e-6)


def test_what_does_not_fit_names_sizes_that_do(of):
    """The utilisation that the error names is one that passes."""
    _, found = of("Qwen3-32B", {f"{ROLLOUT}.gpu_memory_utilization": 0.8})
    (error,) = (text for text in found.errors if text.startswith("generation takes"))
    lower = error.partition("gpu_memory_utilization=")[2].split()[0]
    _, found = of("Qwen3-32B", {f"{ROLLOUT}.gpu_memory_utilization": lower})
    assert not [text for text in (*found.errors, *found.warnings) if text.startswith("generation")]


def test_more_than_any_sharding_leaves(of):
    _, found = of("Qwen3-235B-A22B", {f"{ROLLOUT}.quantization": "null"})
    assert any("actor update takes" in text and "raise trainer.n_gpus_per_node" in text for text in found.errors)


@pytest.mark.parametrize(
    ("keys", "nodes", "kind", "words"),
    [
        ({}, 1, None, None),
        ({}, 3, "warnings", "set actor_rollout_ref.rollout.nnodes=2"),
        (APART, 2, None, None),
        (APART, 1, "errors", "use --nodes 2"),
        (APART | {f"{ROLLOUT}.checkpoint_engine.backend": "naive"}, 1, None, None),
        (APART | {f"{ROLLOUT}.nnodes": 3}, 8, "warnings", "set actor_rollout_ref.rollout.nnodes=7"),
        ({"trainer.nnodes": 2}, 2, None, None),
        ({"trainer.nnodes": 2}, 1, "errors", "or lower trainer.nnodes"),
        ({"trainer.nnodes": 2}, 4, "warnings", "or trainer.nnodes=4"),
    ],
)
def test_nodes(of, keys, nodes, kind, words):
    _, found = of("Qwen3-8B", keys, nodes=nodes)
    about = {name: [text for text in getattr(found, name) if "--nodes" in text] for name in ("errors", "warnings")}
    assert {name for name, texts in about.items() if texts} == ({kind} if kind else set())
    assert kind is None or words in about[kind][0]


def test_several_nodes_are_a_cluster(of):
    _, found = of("Qwen3-8B", {"trainer.nnodes": 2})
    assert any("takes 2 nodes: start it in a Ray cluster" in text for text in found.notes)
    for keys in ({}, {"trainer.nnodes": 2, "ray_kwargs.ray_init.address": "auto"}):
        assert not any("Ray cluster" in text for text in of("Qwen3-8B", keys)[1].notes)


@pytest.mark.parametrize("name", [name for name in HARDWARE if name != "cpu"])
def test_the_device_is_the_hardwares(of, name):
    quantization = "ascend" if name.startswith("npu") else "fp8"
    keys = {f"{ROLLOUT}.quantization": quantization, "trainer.device": "auto", f"{ROLLOUT}.gpu_memory_utilization": 0.4}
    plan, found = of("Qwen3-8B", keys, name)
    assert found.errors == [] and plan.device == name.partition(":")[0]
    _, found = of("Qwen3-8B", {**keys, "trainer.device": "cpu"}, name)
    assert any(f"set trainer.device={name.partition(':')[0]}" in text for text in found.errors)


def test_quantized_bytes_of_fp8(of):
    """By hand: e4m3 for each element of a projection, a float32 for a block of 128 x 128, bfloat16 for the rest."""
    keys = {f"{ROLLOUT}.quantization": "fp8", "trainer.device": "cuda"}
    plan, _ = of("Qwen3-8B", keys, "cuda:h200")
    hidden, width, layers, kv, words = 4096, 12288, 36, 1024, 151936
    elements = layers * hidden * (2 * hidden + 2 * kv + 3 * width)
    plain = 2 * words * hidden + layers * (2 * hidden + 256) + hidden
    assert plan.update_bytes == elements + 4 * elements // (128 * 128) + 2 * plain
    keys[f"{ROLLOUT}.quantization_side"] = "receiver"
    assert of("Qwen3-8B", keys, "cuda:h200")[0].update_bytes == 2 * (elements + plain)


def test_unknown_hardware():
    with pytest.raises(ValueError, match="use one of cpu, cuda:a100"):
        Hardware("npu:910c")


@pytest.mark.parametrize(("tp", "fits"), [(4, True), (8, False)])
def test_experts_in_pairs_of_blocks(of, tp, fits):
    """768 inputs of an expert: 192 on each of 4 ranks, 96 on each of 8, which no known vllm-ascend pairs."""
    _, found = of("Qwen3-30B-A3B", {f"{ROLLOUT}.tensor_model_parallel_size": tp})
    about = [text for text in found.errors if "96 inputs on a rank" in text and "quantization_config_file" in text]
    assert bool(about) is not fits
