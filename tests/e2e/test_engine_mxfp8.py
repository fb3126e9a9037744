"""MXFP8 in a real vLLM engine on the CPU: after each update it computes what a fake-quantized model does."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fixtures.engine import Engine, log_probs_of, weights_of
from fixtures.fake_quant import fake_quantized
from fixtures.tiny import write_tiny_model
from verl.config import RolloutConfig
from verl.utils.vllm import plugin
from verl.workers.rollout.quantization import get_scheme
from verl.workers.weight_sync.encode_report import merged_errors
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

# transformers' own: a value that falls on the other side of a rounding boundary, because vLLM and transformers sum in
# another order, then moves the log-probabilities after it by thousandths, not by hundredths.
STD = 0.02
ROLLOUT = RolloutConfig(quantization="ascend", tensor_model_parallel_size=1)
EVEN = {}
ODD = {"hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 96}
PARTIAL = {"hidden_size": 96, "intermediate_size": 80, "moe_intermediate_size": 80}


def model_dirs(tmp_path, kind, tied, count=4, std=STD, **over):
    if kind != "qwen3_moe":
        over.pop("moe_intermediate_size", None)
    options = dict(kind=kind, tied=tied, std=std, **over)
    return [write_tiny_model(tmp_path / str(seed), seed=seed, **options) for seed in range(count)]


@pytest.fixture
def start():
    started = []

    def start(model_dir, rollout=ROLLOUT, **over):
        plugin.register()
        scheme = get_scheme(rollout, str(model_dir))
        started.append(Engine(model_dir, rollout, **(scheme.engine_overrides("cpu") | over)))
        return started[-1], scheme

    yield start
    for each in started:
        each.close()


@pytest.mark.parametrize(
    ("kind", "tied", "sizes"),
    [
        ("qwen3", True, PARTIAL),
        ("qwen3", False, EVEN),
        ("qwen3_moe", True, ODD),
        ("qwen3_moe", False, PARTIAL),
        ("llama", True, EVEN),
        ("llama", False, ODD),
    ],
    ids=lambda value: {True: "tied", False: "untied"}.get(value, value) if isinstance(value, bool | str) else "",
)
def test_log_probabilities_after_four_updates_are_those_of_a_fake_quantized_model(tmp_path, start, kind, tied, sizes):
    first, *others = model_dirs(tmp_path, kind, tied, **sizes)
    engine, scheme = start(first)
    addresses = engine.rpc("verl_parameter_addresses")
    for version, source in enumerate([*others, first], 1):
        engine.update(scheme.encode(weights_of(source).items()), version, 1 << 24 if version % 2 else 20_000)
        answers, log_probs = engine.sample()
        difference = (log_probs - log_probs_of(fake_quantized(source), answers)).abs()
        assert difference.mean() <= 5e-5
        assert difference.median() <= 1e-6
        assert engine.rpc("verl_parameter_addresses") == addresses
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        assert (log_probs - log_probs_of(plain, answers)).abs().mean() > 1e-3, "nothing was quantized"


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_two_ranks_hold_their_shares(tmp_path, monkeypatch, kind):
    """The workers are processes of their own: "ascend" reaches them through the entry point vllm.general_plugins."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    first, second = model_dirs(tmp_path, kind, False, count=2)
    rollout = replace(ROLLOUT, tensor_model_parallel_size=2)
    scheme = get_scheme(rollout, str(first))
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    engine = Engine(first, rollout, **scheme.engine_overrides("cpu"), **ranks)
    try:
        addresses = engine.rpc("verl_parameter_addresses")
        for version, source in enumerate([second, first, second], 1):
            engine.update(scheme.encode(weights_of(source).items()), version, 20_000)
            answers, log_probs = engine.sample()
            assert (log_probs - log_probs_of(fake_quantized(source), answers)).abs().mean() <= 5e-5
            assert engine.rpc("verl_parameter_addresses") == addresses
    finally:
        engine.close()


def damaged(name, change):
    """A stream in which `change(tensor)` stands for one tensor, or nothing where it returns None."""

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
    "padded scales": ("qwen3", f"{O_PROJ}_scale", padded, rf"{O_PROJ}_scale.*left padded"),
    "a group too few": ("qwen3", f"{Q_PROJ}_scale", lambda s: s[:, :-1], rf"{Q_PROJ}_scale.*of shape"),
    "a weight of another shape": ("qwen3", Q_PROJ, lambda w: w[:-1], rf"{Q_PROJ}"),
    "a NaN scale": ("qwen3", f"{O_PROJ}_scale", with_nan, rf"{O_PROJ}_scale.*NaN"),
    "scales of another dtype": ("qwen3", f"{O_PROJ}_scale", lambda s: s.float(), rf"{O_PROJ}_scale.*uint8.*float32"),
    "a weight that was not quantized": ("qwen3", O_PROJ, lambda w: w.float(), rf"{O_PROJ}.*float32"),
    "a scale of an expert": ("qwen3_moe", f"{EXPERT}_scale", lambda _: None, rf"{EXPERT}.*scales.*did not arrive"),
    "a NaN scale of an expert": ("qwen3_moe", f"{EXPERT}_scale", with_nan, rf"{EXPERT}_scale.*NaN"),
}


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_what_is_damaged_is_named_and_a_whole_update_heals(tmp_path, start, kind):
    # Three heads of 32: row-parallel layers with an odd number of groups.
    first, second = model_dirs(tmp_path, kind, True, count=2, num_attention_heads=3, num_key_value_heads=3)
    engine, scheme = start(first)
    weights = weights_of(second)
    for fault_kind, name, change, message in FAULTS.values():
        if fault_kind == kind:
            with pytest.raises(WeightUpdateError, match=message):
                engine.update(damaged(name, change)(scheme.encode(weights.items())), 1)
    for left_out in (DOWN, EXPERT, O_PROJ):
        if left_out in weights:
            rest = {key: tensor for key, tensor in weights.items() if key != left_out}
            layer = left_out.split(".")[2]
            with pytest.raises(WeightUpdateError, match=rf"not written, the first is 'model\.layers\.{layer}\."):
                engine.update(scheme.encode(rest.items()), 2)
    engine.update(scheme.encode(weights.items()), 3)
    answers, log_probs = engine.sample()
    assert (log_probs - log_probs_of(fake_quantized(second), answers)).abs().mean() <= 5e-5


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_both_sides_give_the_same_bytes(tmp_path, start, kind):
    first, second = model_dirs(tmp_path, kind, True, count=2, **PARTIAL)
    ignore = tmp_path / "ignore.json"
    ignore.write_text(json.dumps({"ignore": ["model.layers.1.self_attn.o_proj"]}))
    rollout = replace(ROLLOUT, quantization_config_file=str(ignore))
    here, scheme = start(first, rollout)
    there, _ = start(first, replace(rollout, quantization_side="receiver"))
    for version, source in enumerate((second, first), 1):
        weights = weights_of(source)
        [received_encoded] = here.update(scheme.encode(weights.items()), version, 20_000)
        [received_plain] = there.update(weights.items(), version, 20_000)
        assert here.rpc("verl_parameter_hashes") == there.rpc("verl_parameter_hashes")
        assert received_encoded["errors"] == {} and received_encoded["encode"] == 0
        assert received_plain["errors"] == merged_errors([scheme.pop_report().to_message()])
        assert received_plain["bytes"] > 2.5 * received_encoded["bytes"]
    spoilt = weights | {Q_PROJ: torch.full_like(weights[Q_PROJ], float("nan"))}
    with pytest.raises(WeightUpdateError, match=f"{Q_PROJ}.*NaN"):
        there.update(spoilt.items(), 3)
    there.update(weights.items(), 4)
    assert here.rpc("verl_parameter_hashes") == there.rpc("verl_parameter_hashes")


def test_layers_left_out_stay_as_they_are(tmp_path, start):
    first, second = model_dirs(tmp_path, "qwen3", True, count=2)
    ignore = tmp_path / "ignore.json"
    ignore.write_text(json.dumps({"ignore": [r"re:.*\.o_proj", r"re:.*\.down_proj"]}))
    engine, scheme = start(first, replace(ROLLOUT, quantization_config_file=str(ignore)))
    engine.update(scheme.encode(weights_of(second).items()), 1)
    answers, log_probs = engine.sample()
    expected = fake_quantized(second, left_out=("lm_head", "o_proj", "down_proj"))
    assert (log_probs - log_probs_of(expected, answers)).abs().mean() <= 5e-5


@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_the_sender(tmp_path, name, value):
    (source,) = model_dirs(tmp_path, "qwen3", True, count=1)
    scheme = get_scheme(ROLLOUT, str(source))
    weights = weights_of(source)
    weights[name][1, 2] = value
    with pytest.raises(WeightUpdateError, match=f"{name}.*NaN or Inf"):
        list(scheme.encode(weights.items()))
