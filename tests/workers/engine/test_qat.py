"""Quantization-aware training, compared with models whose rounding is written independently."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import make_batch
from fixtures.fake_quant import LEFT_OUT, fake_quantized, mxfp4_round_trip
from fixtures.qat_cases import qat_gradient_program, qat_log_prob_program, qat_step_program, straight_through
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.trainer.ppo.batching import split_mini_batches

# The last block of some rows is not full: 3 heads of 24 elements, 80 in the MLP.
ODD = {"head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 80}
CASES = {
    "qwen3": ("qwen3", {}),
    "untied, not full blocks": ("qwen3", {"tied": False, **ODD}),
    "experts": ("qwen3_moe", {}),
}


SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Return a function that writes the model of a case, once."""
    written = {}

    def model_dir(case):
        if case not in written:
            kind, over = CASES[case]
            written[case] = str(write_tiny_model(tmp_path_factory.mktemp("model"), kind=kind, **over))
        return written[case]

    return model_dir


@pytest.fixture(params=CASES)
def model_dir(request, write):
    return write(request.param)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("dense")))


def log_probs_of(model, data):
    """Return log-probabilities [B, T] of all response tokens, computed with left padding and all logits."""
    width = data.batch["responses"].shape[1]
    columns = {name: data.batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**columns).logits[:, -width - 1 : -1]
    chosen = (logits / data.meta_info["temperature"]).log_softmax(-1).gather(-1, data.batch["responses"].unsqueeze(-1))
    return chosen.squeeze(-1) * data.batch["response_mask"]


def check_close(log_probs, expected):
    """Check the tokens of the responses: all but a few are equal.

    Another order of sums, which depends on the machine, now and then moves a number over a rounding boundary. That
    changes the rest of its sequence a little, whereas a layer that rounds otherwise changes every token.
    """
    difference = (log_probs - expected)[expected != 0].abs()
    assert (difference < 1e-5).float().mean() > 0.75 and difference.max() < 0.1


@pytest.mark.parametrize("model", [{}, {"use_remove_padding": False}, {"enable_gradient_checkpointing": True}], ids=str)
def test_log_probs_equal_those_of_an_independently_rounded_model(model_dir, model):
    data = make_batch()
    with torch.no_grad():
        expected = log_probs_of(fake_quantized(model_dir), data)
        plain = log_probs_of(AutoModelForCausalLM.from_pretrained(model_dir), data)
    [log_probs] = run_ranks(1, qat_log_prob_program, model_dir, [data], {}, model)
    check_close(log_probs, expected)
    assert (log_probs - plain).abs().mean() > 1e-3, "nothing was quantized"


@SLOW
def test_two_ranks_compute_what_one_computes(model_dir):
    data = make_batch()
    with torch.no_grad():
        expected = log_probs_of(fake_quantized(model_dir), data)
    for log_probs in run_ranks(2, qat_log_prob_program, model_dir, [data, data], {}, {}):
        check_close(log_probs, expected)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="w8a8"),
        pytest.param({"activations": False}, id="w8a16", marks=SLOW),
        pytest.param({"mask_saturated": True}, id="masked", marks=SLOW),
    ],
)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=SLOW)])
def test_gradients_equal_straight_through_gradients_in_float64(model_dir, ranks, options):
    data = make_batch()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, experts_implementation="eager")
    model = straight_through(model, activations=options.get("activations", True), mask="mask_saturated" in options)
    log_probs_of(model, data).sum().backward()
    expected = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    shards = [data] if ranks == 1 else [data[:5], data[5:]]
    for found in run_ranks(ranks, qat_gradient_program, model_dir, shards, options, {}):
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # A number on the other side of a rounding boundary changes a few elements by a percent.
            error = (found[name] - gradient).norm() / gradient.norm()
            assert error < 2e-2, f"{name}: relative error {error:.3g}"
    if options:
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, experts_implementation="eager")
        log_probs_of(straight_through(model), data).sum().backward()
        layer = next(name for name in expected if name.endswith("self_attn.o_proj.weight"))
        other = model.get_parameter(layer).grad.float()
        assert (expected[layer] - other).norm() / other.norm() > 2e-2, "the option changes nothing"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainer_computes_with_the_bytes_that_it_sends(tmp_path, model_dir, ranks):
    data = make_batch()
    shards = split_mini_batches(data, 4, ranks)
    outcomes = run_ranks(ranks, qat_step_program, model_dir, shards, data, str(tmp_path), {})
    with torch.no_grad():
        expected = log_probs_of(fake_quantized(tmp_path), data)
    before, after = load_file(f"{model_dir}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(not torch.equal(before[name], weight) for name, weight in after.items() if weight.dim() > 1)
    for outcome in outcomes:
        check_close(outcome["log_probs"], expected)
        assert outcome["sent"].keys() == outcome["again"].keys()
        for name, tensor in outcome["again"].items():
            assert tensor.dtype == outcome["sent"][name].dtype
            assert torch.equal(tensor.view(torch.uint8), outcome["sent"][name].view(torch.uint8)), name
        assert len(outcome["changed"]) >= 16 and all(outcome["changed"].values())
        quantized = sorted(name for name in outcome["sent"] if f"{name}_scale" in outcome["sent"])
        first, second = outcome["reports"]
        assert first == second and len(first) >= 8
        if "experts" not in str(quantized):
            assert first == quantized


def test_an_adapter_trains_on_the_merged_weight_that_the_engine_holds(tmp_path, dense):
    data = make_batch()
    model = {"lora_rank": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}
    shards = split_mini_batches(data, 4, 1)
    [outcome] = run_ranks(1, qat_step_program, dense, shards, data, str(tmp_path), model)
    with torch.no_grad():
        check_close(outcome["log_probs"], log_probs_of(fake_quantized(tmp_path), data))
    before, after = load_file(f"{dense}/model.safetensors"), load_file(tmp_path / "model.safetensors")
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "down_proj"}


def test_layers_that_the_engine_does_not_quantize_are_not_rounded(tmp_path, dense):
    file = tmp_path / "ignore.json"
    file.write_text(json.dumps({"ignore": ["re:.*mlp.*"]}))
    data = make_batch()
    with torch.no_grad():
        expected = log_probs_of(fake_quantized(dense, (*LEFT_OUT, "gate_proj", "up_proj", "down_proj")), data)
    [log_probs] = run_ranks(
        1, qat_log_prob_program, dense, [data], {"rollout": {"quantization_config_file": str(file)}}, {}
    )
    check_close(log_probs, expected)


@pytest.mark.parametrize("case", ["qwen3", pytest.param("experts", marks=SLOW)])
def test_weights_in_mxfp4(write, case):
    data, directory = make_batch(), write(case)
    with torch.no_grad():
        expected = log_probs_of(fake_quantized(directory, weights=lambda name: mxfp4_round_trip), data)
        mxfp8 = log_probs_of(fake_quantized(directory), data)
    options = {"rollout": {"quantization_scheme": "W4A8_MXFP"}}
    [log_probs] = run_ranks(1, qat_log_prob_program, directory, [data], options, {})
    check_close(log_probs, expected)
    assert (mxfp8 - expected).abs().mean() > 1e-2
    [found] = run_ranks(1, qat_gradient_program, directory, [data], options | {"mask_saturated": True}, {})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")
    log_probs_of(straight_through(model, mask=True, weight_bits=4), data).sum().backward()
    for name, parameter in model.named_parameters():
        error = (found[name] - parameter.grad.float()).norm() / parameter.grad.norm()
        assert error < 2e-2, f"{name}: relative error {error:.3g}"
