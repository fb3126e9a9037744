"""Errors of the layers' outputs, compared with products of independently rounded numbers in float64."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fixtures.engine_cases import make_batch
from fixtures.fake_quant import LEFT_OUT, mxfp8_round_trip
from fixtures.qat_cases import output_error_program
from fixtures.ranks import run_ranks
from fixtures.tiny import write_tiny_model
from verl.utils.quantization.encode_report import added_errors

SLOW = pytest.mark.slow


def product_errors(x, weight):
    """Return the squared error of round(x) @ round(weight).T, and the squared product, over all elements."""
    exact = x.double() @ weight.double().T
    rounded = mxfp8_round_trip(x).double() @ mxfp8_round_trip(weight).double().T
    return torch.tensor([float((rounded - exact).square().sum()), float(exact.square().sum())])


def expected_errors(model_dir, data):
    """Return the sums of an unsharded model, one sample after another without padding."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    found = {}

    def add(name, x, weight):
        found[name] = found.get(name, torch.zeros(2)) + product_errors(x, weight.detach())

    def linear(name):
        return lambda module, inputs, output: add(f"{name}.weight", inputs[0].flatten(0, -2), module.weight)

    def experts(name):
        def hook(module, inputs, output):
            hidden, chosen, _ = inputs
            for x, of_token in zip(hidden, chosen, strict=True):
                for expert in of_token:
                    add(f"{name}.gate_up_proj", x[None], module.gate_up_proj[expert])
                    gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                    add(f"{name}.down_proj", (nn.functional.silu(gate) * up)[None], module.down_proj[expert])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in LEFT_OUT:
            module.register_forward_hook(linear(name))
        elif hasattr(module, "gate_up_proj") and getattr(module.down_proj, "ndim", 0) == 3:
            module.register_forward_hook(experts(name))
    with torch.no_grad():
        for ids, mask in zip(data.batch["input_ids"], data.batch["attention_mask"], strict=True):
            model(input_ids=ids[mask.bool()][None])
    return found


@pytest.mark.parametrize(
    ("kind", "ranks", "trains_on_them"),
    [
        ("qwen3", 1, False),
        pytest.param("qwen3", 2, False, marks=SLOW),
        pytest.param("qwen3_moe", 2, False, marks=SLOW),
        pytest.param("qwen3_moe", 1, True, marks=SLOW),
    ],
)
def test_errors_are_those_of_every_product(tmp_path, kind, ranks, trains_on_them):
    model_dir = str(write_tiny_model(tmp_path, kind=kind, std=0.02))
    data = make_batch(4)
    shards = [data[rank * 4 // ranks : (rank + 1) * 4 // ranks] for rank in range(ranks)]
    found = added_errors(run_ranks(ranks, output_error_program, model_dir, shards, trains_on_them))
    expected = expected_errors(model_dir, data)
    assert found.keys() == expected.keys()
    for name, sums in found.items():
        relative = (sums[0] / sums[1]) ** 0.5
        # In a model that computes with rounded numbers, the layers' inputs differ slightly.
        tolerance = 0.05 if trains_on_them else 1e-3
        assert relative == pytest.approx((expected[name][0] / expected[name][1]).sqrt().item(), rel=tolerance), name
        assert 0.005 < relative < 0.1, name
