"""MXFP8 in a real vLLM engine on the CPU: after each update it computes the same as a fake-quantized model."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.engine import log_probs_of, weights_of
from fixtures.fake_quant import check_equal_up_to_rounding, fake_quantized
from verl.config import RolloutConfig
from verl.utils.quantization.encode_report import merged_errors
from verl.workers.rollout.quantization import get_scheme
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

# The default of transformers; see `check_equal_up_to_rounding`.
STD = 0.02
ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
EVEN = {}
ODD = {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 96}
PARTIAL = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 80}


@pytest.fixture
def models(tiny_models):
    """`models(kind, tied, count, **sizes)`: directories of models with other weights each."""

    def write(kind, tied, count=2, **over):
        if kind != "qwen3_moe":
            over.pop("moe_intermediate_size", None)
        return tiny_models(count, kind=kind, tied=tied, std=STD, **over)

    return write


@pytest.mark.parametrize(
    ("kind", "tied", "sizes"),
    [
        ("qwen3_moe", True, ODD),
        ("qwen3_moe", False, PARTIAL),
        ("qwen3", True, PARTIAL),
        ("qwen3", False, EVEN),
        ("llama", True, EVEN),
        ("llama", False, ODD),
    ],
    ids=lambda value: {True: "tied", False: "untied"}.get(value, value) if isinstance(value, bool | str) else "",
)
def test_log_probs_after_four_updates_equal_those_of_a_fake_quantized_model(models, engines, kind, tied, sizes):
    first, *others = models(kind, tied, 4, **sizes)
    engine, scheme = engines.get(first, ROLLOUT)
    addresses = engine.rpc("verl_parameter_addresses")
    for number, source in enumerate([*others, first]):
        engine.checked("verl_check_engine", engine.quantization, True)
        engine.update(scheme.encode(weights_of(source).items()), bucket_bytes=20_000 if number % 2 else 1 << 24)
        engine.checked("verl_check_engine", engine.quantization, True)  # changes nothing
        responses, log_probs = engine.sample()
        check_equal_up_to_rounding(log_probs, log_probs_of(fake_quantized(source), responses))
        assert engine.rpc("verl_parameter_addresses") == addresses
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert (log_probs - log_probs_of(plain, responses)).abs().mean() > 1e-3, "nothing was quantized"


def damaged(name, change):
    """Return a function that replaces the tensor `name` of a stream by `change(tensor)`, or drops it for None."""

    def stream(named_tensors):
        for key, tensor in named_tensors:
            tensor = change(tensor) if key == name else tensor
            if tensor is not None:
                yield key, tensor

    return stream


O_PROJ, DOWN = "model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"
Q_PROJ, EXPERT = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.experts.2.up_proj.weight"


def padded(scales):
    return torch.nn.functional.pad(scales, (0, 1))


def with_nan(scales):
    scales = scales.clone()
    scales[-1, -1] = 255
    return scales


FAULTS = {
    "a weight without its scales": ("qwen3", f"{DOWN}_scale", lambda _: None, rf"{DOWN}.*scales.*did not arrive"),
    "scales without their weight": ("qwen3", Q_PROJ, lambda _: None, rf"{Q_PROJ}_scale.*weight.*did not arrive"),
    "padded scales": ("qwen3", f"{O_PROJ}_scale", padded, rf"{O_PROJ}_scale.*padded"),
    "a group too few": ("qwen3", f"{Q_PROJ}_scale", lambda s: s[:, :-1], rf"{Q_PROJ}_scale.*of shape"),
    "a weight of another shape": ("qwen3", Q_PROJ, lambda w: w[:-1], rf"{Q_PROJ}"),
    "a NaN scale": ("qwen3", f"{O_PROJ}_scale", with_nan, rf"{O_PROJ}_scale.*NaN"),
    "scales of another dtype": (
        "qwen3",
        f"{O_PROJ}_scale",
        lambda s: s.float(),
        rf"{O_PROJ}_scale.*float32.*expected uint8",
    ),
    "a weight that was not quantized": ("qwen3", O_PROJ, lambda w: w.float(), rf"{O_PROJ}.*float32"),
    "a scale of an expert": ("qwen3_moe", f"{EXPERT}_scale", lambda _: None, rf"{EXPERT}.*scales.*did not arrive"),
    "a NaN scale of an expert": ("qwen3_moe", f"{EXPERT}_scale", with_nan, rf"{EXPERT}_scale.*NaN"),
}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_damaged_weight_is_named_and_a_full_update_repairs_the_engine(models, engines, kind):
    # Three heads of 32 elements: row-parallel layers with an odd number of groups.
    first, second = models(kind, True, num_attention_heads=3, num_key_value_heads=3)
    engine, scheme = engines.get(first, ROLLOUT)
    weights = weights_of(second)
    for fault_kind, name, change, message in FAULTS.values():
        if fault_kind == kind:
            with pytest.raises(WeightUpdateError, match=message):
                engine.update(damaged(name, change)(scheme.encode(weights.items())))
    for left_out in (DOWN, EXPERT, O_PROJ):
        if left_out in weights:
            rest = {key: tensor for key, tensor in weights.items() if key != left_out}
            layer = left_out.split(".")[2]
            with pytest.raises(WeightUpdateError, match=rf"not written, the first is 'model\.layers\.{layer}\."):
                engine.update(scheme.encode(rest.items()))
    engine.update(scheme.encode(weights.items()))
    responses, log_probs = engine.sample()
    check_equal_up_to_rounding(log_probs, log_probs_of(fake_quantized(second), responses))


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_sender_and_receiver_encode_to_the_same_bytes(tmp_path, models, engines, kind):
    first, second = models(kind, True, **PARTIAL)
    ignore = tmp_path / "ignore.json"
    ignore.write_text(json.dumps({"ignore": ["model.layers.1.self_attn.o_proj"]}))
    rollout = replace(ROLLOUT, quantization_config_file=str(ignore))
    by_sender, scheme = engines.get(first, rollout)
    by_receiver, _ = engines.get(first, replace(rollout, quantization_side="receiver"))
    for source in (second, first):
        weights = weights_of(source)
        [encoded] = by_sender.update(scheme.encode(weights.items()), bucket_bytes=20_000)
        [plain] = by_receiver.update(weights.items(), bucket_bytes=20_000)
        assert by_sender.rpc("verl_parameter_hashes") == by_receiver.rpc("verl_parameter_hashes")
        assert encoded["errors"] == {} and encoded["encode"] == 0
        assert plain["errors"] == merged_errors([scheme.pop_report().to_message()])
        assert plain["bytes"] > 2.5 * encoded["bytes"]
    with_nan = weights | {Q_PROJ: torch.full_like(weights[Q_PROJ], float("nan"))}
    with pytest.raises(WeightUpdateError, match=f"{Q_PROJ}.*NaN"):
        by_receiver.update(with_nan.items())
    by_receiver.update(weights.items())
    assert by_sender.rpc("verl_parameter_hashes") == by_receiver.rpc("verl_parameter_hashes")


def test_ignored_layers_are_not_quantized(tmp_path, models, engines):
    first, second = models("qwen3", True)
    ignore = tmp_path / "ignore.json"
    ignore.write_text(json.dumps({"ignore": [r"re:.*\.o_proj", r"re:.*\.down_proj"]}))
    engine, scheme = engines.get(first, replace(ROLLOUT, quantization_config_file=str(ignore)))
    engine.update(scheme.encode(weights_of(second).items()))
    responses, log_probs = engine.sample()
    expected = fake_quantized(second, left_out=("lm_head", "o_proj", "down_proj"))
    check_equal_up_to_rounding(log_probs, log_probs_of(expected, responses))


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_sender_rejects_weights_that_are_not_finite(models, name, value):
    (source,) = models("qwen3", True, 1)
    scheme = get_scheme(ROLLOUT, str(source))
    weights = weights_of(source)
    weights[name][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{name}.*NaN or Inf"):
        list(scheme.encode(weights.items()))
