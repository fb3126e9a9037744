"""Weight updates of a real vLLM engine: afterwards its log-probabilities equal those of transformers.

The engine starts with `load_format=dummy`, and every update sends weights that differ from the last ones: some faults
of a reload do not show while old and new weights are equal.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.engine import log_probs_of, weights_of
from verl.config import ModelConfig, RolloutConfig
from verl.workers.rollout.vllm_rollout.engine_args import engine_args
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender

pytestmark = pytest.mark.e2e

PROMPT = [1] + [(i * 5) % 90 + 4 for i in range(20)]
# One token short of two full blocks of vLLM's cache on a CPU, so that a prefix is cached and can become stale.
LONG_PROMPT = [1] + [(i * 7) % 90 + 4 for i in range(200)]

# The sizes that fp8's blocks of 128 x 128 need.
WIDE = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 256}


@pytest.fixture
def engine(engines):
    """`engine(model_dir)`: an engine without quantization and with a prefix cache."""
    return lambda model_dir: engines.get(model_dir, enable_prefix_caching=True)[0]


def update(engine, model_dir, bucket_bytes=1 << 24, **options):
    engine.update(weights_of(model_dir).items(), bucket_bytes=bucket_bytes, **options)


def deviation(engine, model_dir, prompt=PROMPT, **override):
    """Largest difference of the engine's log-probabilities from those of transformers, over eight sampled tokens.

    Args:
        override: fields of the config that transformers replaces.
    """
    responses, log_probs = engine.sample(8, [prompt])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **override)
    return (log_probs - log_probs_of(model, responses, [prompt])).abs().max()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3", "llama"])
def test_log_probs_equal_those_of_transformers_after_each_update(tiny_models, engine, kind, tied):
    first, second = tiny_models(2, kind=kind, tied=tied)
    running = engine(first)
    addresses = None
    for source, bucket_bytes in [(second, 1 << 24), (first, 20_000), (second, 7_000)]:
        update(running, source, bucket_bytes)
        assert deviation(running, source) < 1e-5
        now = running.rpc("verl_parameter_addresses")
        assert addresses is None or now == addresses
        addresses = now


def test_experts_with_a_width_that_the_cpu_kernel_pads_are_updated(tiny_models, engine):
    first, second = tiny_models(2, kind="qwen3_moe", tied=False, moe_intermediate_size=48)
    running = engine(first)
    for source in (second, first):
        update(running, source, 20_000)
        assert deviation(running, source) < 1e-5


def test_the_prefix_cache_is_stale_until_it_is_reset(tiny_models, engine):
    first, second = tiny_models(2, kind="qwen3", tied=True)
    running = engine(first)
    update(running, first)
    running.sample(8, [LONG_PROMPT])
    update(running, second, reset_prefix_cache=False)
    assert deviation(running, second, LONG_PROMPT) > 1e-3, "no key or value was stale: is the reset still needed?"
    update(running, second)
    assert deviation(running, second, LONG_PROMPT) < 1e-5


@pytest.mark.parametrize(
    "missing",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_parameter_is_named_and_a_full_update_repairs_the_engine(tiny_models, engine, missing):
    first, second = tiny_models(2, kind="qwen3", tied=True)
    running = engine(first)
    update(running, first)
    layer = missing.split(".")[2] if "layers" in missing else missing.split(".")[1]
    rest = {name: weight for name, weight in weights_of(second).items() if name != missing}
    with pytest.raises(WeightUpdateError, match=rf"not written, the first is '.*{layer}.*"):
        running.update(rest.items())
    update(running, second)
    assert deviation(running, second) < 1e-5


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("quantization", [None, "fp8", "ascend"])
def test_tensors_without_a_place_in_the_engine_are_refused(tiny_models, engines, quantization, side):
    """transformers' Qwen3 with `attention_bias` also has a bias after the attention, which vLLM's model lacks."""
    (source,) = tiny_models(1, kind="qwen3", tied=True, attention_bias=True, **WIDE)
    rollout = RolloutConfig(quantization=quantization, quantization_side=side, tensor_model_parallel_size=1)
    running, scheme = engines.get(source, rollout, dtype="bfloat16")
    weights = {name: weight.bfloat16() for name, weight in weights_of(source).items()}
    rest = {name: weight for name, weight in weights.items() if not name.endswith("o_proj.bias")}
    extra = "model.layers.1.self_attn.o_proj.bias"

    def send(tensors):
        running.update(scheme.encode(tensors.items()) if side == "sender" else tensors.items())

    for _ in range(2):
        with pytest.raises(WeightUpdateError, match=rf"no place for 2 tensors .*: model\.layers\.0\..*, {extra}\."):
            send(weights)
    send(rest)
    # A later load is watched too, if it has a name that no earlier one used.
    with pytest.raises(WeightUpdateError, match=rf"no place for 1 tensors .*: {extra}\."):
        send(rest | {extra: weights[extra]})


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_an_overridden_config_holds_for_the_engine_too(tiny_models, engines, kind):
    """As in the trainer: transformers with the same override is the reference."""
    (source,) = tiny_models(1, kind=kind, tied=True)
    override = {"rms_norm_eps": 0.3, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}
    model = ModelConfig(path=str(source), override_config=override)
    sizes = {"prompt_length": 8, "response_length": 8, "seed": 0}
    arguments = engine_args(RolloutConfig(), model, device="cpu", dtype="float32", **sizes)
    running, _ = engines.get(source, hf_overrides=arguments["hf_overrides"])
    update(running, source)
    assert deviation(running, source, **override) < 1e-5
    assert deviation(running, source) > 1e-2, "the override changes nothing"


def test_one_missing_expert_is_named(tiny_models, engine):
    first, second = tiny_models(2, kind="qwen3_moe", tied=True)
    running = engine(first)
    weights = weights_of(second)
    del weights["model.layers.1.mlp.experts.2.down_proj.weight"]
    with pytest.raises(WeightUpdateError, match=r"layers\.1\.mlp\.experts"):
        running.update(weights.items())


def test_an_engine_that_starts_after_a_refused_update_of_another_one_is_not_affected(tiny_models, engine):
    """vLLM shares the rotary embeddings of all engines in a process."""
    first, second = tiny_models(2, kind="qwen3", tied=True, intermediate_size=160)
    (other,) = tiny_models(1, kind="qwen3", tied=False, intermediate_size=160)
    refused = engine(first)
    weights = weights_of(first)
    del weights["model.norm.weight"]
    with pytest.raises(WeightUpdateError, match="not written"):
        refused.update(weights.items())
    started = engine(other)  # has the same ones
    update(started, other)
    assert deviation(started, other) < 1e-5
    update(refused, second)
    assert deviation(refused, second) < 1e-5 and deviation(started, other) < 1e-5


def test_an_update_that_was_abandoned_does_not_affect_the_next_one(tiny_models, engine):
    first, second = tiny_models(2, kind="qwen3_moe", tied=False)
    running = engine(first)
    update(running, first)
    sender = WeightSender(20_000)
    abandoned = running.version + 1
    running.checked("verl_begin_update", abandoned)
    sender.begin(abandoned, weights_of(second).items())
    for _ in range(3):
        running.checked("verl_load_bucket", sender.next_bucket())
    running.version = abandoned
    update(running, second, 30_000)
    assert deviation(running, second) < 1e-5


def test_after_a_wrong_shape_the_engine_takes_the_next_update(tiny_models, engine):
    first, second = tiny_models(2, kind="qwen3", tied=True)
    running = engine(first)
    update(running, second)
    weights = weights_of(first)
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(WeightUpdateError):
        running.update({**weights, name: weights[name][:, :-1].contiguous()}.items())
    update(running, first)
    assert deviation(running, first) < 1e-5


def test_load_weights_alone_fails_on_packed_weights(tiny_models, engine):
    """The reason for the layer-wise reload: vLLM cannot load into weights that the CPU kernels have packed."""
    first, second = tiny_models(2, kind="qwen3", tied=True)
    running = engine(first)
    with pytest.raises((AttributeError, AssertionError)):
        running.model.load_weights(weights_of(second).items())


def test_a_bucket_without_an_open_update_is_an_error():
    with pytest.raises(WeightUpdateError, match="begin first"):
        WeightReceiver(session=None).load_bucket({"version": 1, "index": 0})
