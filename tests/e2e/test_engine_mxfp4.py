"""MXFP4 weights in a real vLLM engine on the CPU: after each update it computes the same as a fake-quantized model."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.delta_steps import check_delta_steps
from fixtures.engine import log_probs_of, weights_of
from fixtures.fake_quant import check_equal_up_to_rounding, fake_quantized, mxfp4_round_trip, mxfp8_round_trip
from verl.config import RolloutConfig
from verl.utils.quantization.encode_report import merged_errors
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

STD = 0.02  # the default of transformers; see `check_equal_up_to_rounding`
ROLLOUT = RolloutConfig(quantization="ascend", quantization_scheme="W4A8_MXFP", tensor_model_parallel_size=1)
O_PROJ, Q_PROJ = "model.layers.1.self_attn.o_proj.weight", "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUND_TRIPS = {"W4A8_MXFP": mxfp4_round_trip, "W8A8_MXFP8": mxfp8_round_trip, "FLOAT": lambda x: x}


def mxfp4(name):
    """All weights are in MXFP4."""
    return mxfp4_round_trip


def check_engine(engine, source, weights, left_out=("lm_head", "gate")):
    """Compare sampled log-probabilities with those of the fake-quantized model, and with the plain one."""
    responses, log_probs = engine.sample()
    expected = log_probs_of(fake_quantized(source, left_out, weights), responses)
    check_equal_up_to_rounding(log_probs, expected)
    assert (log_probs - expected).abs().mean() <= 5e-5
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert (log_probs - log_probs_of(plain, responses)).abs().mean() > 1e-3, "nothing was quantized"
    by_mxfp8 = log_probs_of(fake_quantized(source), responses)
    assert (log_probs - by_mxfp8).abs().mean() > 1e-3, "the weights are in MXFP8"


@pytest.mark.parametrize(
    ("kind", "tied"), [("qwen3", True), ("llama", False), ("qwen3_moe", True), ("qwen3_moe", False)]
)
def test_log_probs_after_four_updates_equal_those_of_a_fake_quantized_model(tiny_models, engines, kind, tied):
    first, *others = tiny_models(4, kind=kind, tied=tied, std=STD)
    engine, scheme = engines.get(first, ROLLOUT)
    addresses = engine.rpc("verl_parameter_addresses")
    for number, source in enumerate([*others, first]):
        engine.update(scheme.encode(weights_of(source).items()), bucket_bytes=20_000 if number % 2 else 1 << 24)
        check_engine(engine, source, mxfp4)
        assert engine.rpc("verl_parameter_addresses") == addresses


def description_of(scheme, change):
    """Return the description of a scheme's checkpoint with the values that `change` returns for the quantized keys."""
    entries = scheme.format.description.to_json_dict()
    return {key: change(key) if value == "W4A8_MXFP" and "." in key else value for key, value in entries.items()}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_schemes_are_mixed_by_layer(tmp_path, tiny_models, engines, kind):
    """Attention in MXFP8, everything else in MXFP4, down_proj of the first layer unquantized if it is dense."""
    first, second = tiny_models(2, kind=kind, std=STD)
    file = tmp_path / "description.json"
    _, whole = engines.get(first, ROLLOUT)

    def scheme_of(key):
        unquantized = kind == "qwen3" and "layers.0.mlp.down_proj" in key
        return "FLOAT" if unquantized else "W8A8_MXFP8" if "self_attn" in key else "W4A8_MXFP"

    file.write_text(json.dumps(description_of(whole, scheme_of)))
    rollout = replace(ROLLOUT, quantization_scheme=None, quantization_config_file=str(file))
    engine, scheme = engines.get(first, rollout)
    for source in (second, first):
        engine.update(scheme.encode(weights_of(source).items()), bucket_bytes=20_000)
        expected = fake_quantized(source, weights=lambda name: ROUND_TRIPS[scheme_of(name)])
        if kind == "qwen3":
            expected.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
        responses, log_probs = engine.sample()
        check_equal_up_to_rounding(log_probs, log_probs_of(expected, responses))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_delta_updates_equal_full_updates(tiny_models, engines, kind):
    (model_dir,) = tiny_models(1, kind=kind, std=STD)
    engine, scheme = engines.get(model_dir, ROLLOUT)
    check_delta_steps(engine, scheme, weights_of(model_dir), torch.float32, steps=10)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_sender_and_receiver_encode_to_the_same_bytes(tiny_models, engines, kind):
    first, second = tiny_models(2, kind=kind, std=STD)
    by_sender, scheme = engines.get(first, ROLLOUT)
    by_receiver, _ = engines.get(first, replace(ROLLOUT, quantization_side="receiver"))
    for source in (second, first):
        weights = weights_of(source)
        [encoded] = by_sender.update(scheme.encode(weights.items()), bucket_bytes=20_000)
        [plain] = by_receiver.update(weights.items(), bucket_bytes=20_000)
        assert by_sender.rpc("verl_parameter_hashes") == by_receiver.rpc("verl_parameter_hashes")
        assert plain["errors"] == merged_errors([scheme.pop_report().to_message()])
        assert plain["bytes"] > 3 * encoded["bytes"]


def without(name):
    return lambda key, tensor: None if key == name else tensor


def replaced(name, change):
    return lambda key, tensor: change(tensor) if key == name else tensor


FAULTS = {
    "a weight without its scales": ("qwen3", without(f"{O_PROJ}_scale"), rf"{O_PROJ}.*scales.*did not arrive"),
    "scales without their weight": ("qwen3", without(Q_PROJ), rf"{Q_PROJ}_scale.*weight.*did not arrive"),
    "scales of another shape": ("qwen3", replaced(f"{Q_PROJ}_scale", lambda s: s[:, :-1]), rf"{Q_PROJ}_scale.*shape"),
    "a weight in MXFP8": (
        "qwen3",
        replaced(O_PROJ, lambda w: torch.zeros(w.shape[0], 2 * w.shape[1]).to(torch.float8_e4m3fn)),
        O_PROJ,
    ),
    "an unquantized weight": ("qwen3", replaced(O_PROJ, lambda w: w.float()), rf"{O_PROJ}.*float32"),
    "a truncated weight": ("qwen3", replaced(Q_PROJ, lambda w: w[:-1]), Q_PROJ),
    "a scale of an expert": ("qwen3_moe", without(f"{EXPERT}_scale"), rf"{EXPERT}.*scales.*did not arrive"),
    "a NaN scale of an expert": (
        "qwen3_moe",
        replaced(f"{EXPERT}_scale", lambda s: torch.full_like(s, 255)),
        rf"{EXPERT}_scale.*NaN",
    ),
}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_damaged_weight_is_named_and_a_full_update_repairs_the_engine(tiny_models, engines, kind):
    first, second = tiny_models(2, kind=kind, std=STD)
    engine, scheme = engines.get(first, ROLLOUT)
    weights = weights_of(second)
    for fault_kind, change, message in FAULTS.values():
        if fault_kind == kind:
            changed = ((key, change(key, tensor)) for key, tensor in scheme.encode(weights.items()))
            with pytest.raises(WeightUpdateError, match=message):
                engine.update((key, tensor) for key, tensor in changed if tensor is not None)
    engine.update(scheme.encode(weights.items()))
    check_engine(engine, second, mxfp4)


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_sender_rejects_weights_that_are_not_finite(tiny_models, engines, name, value):
    (source,) = tiny_models(1, std=STD)
    _, scheme = engines.get(source, ROLLOUT)
    weights = weights_of(source)
    weights[name][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{name}.*NaN or Inf"):
        list(scheme.encode(weights.items()))
