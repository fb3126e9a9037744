"""Outputs of updated layers compared with products of matrices that the reference rounded to MXFP8."""

import numpy as np
import pytest
import torch
from contract.vllm_ascend.forward import complete_experts, in_float32, log_probs
from contract.vllm_ascend.harness import build_model, engine
from contract.vllm_ascend.reference import canonical, packed, rounded
from contract.vllm_ascend.updates import Updates, checkpoints, config_of, scheme_of, weights_of
from transformers import AutoModelForCausalLM

from fixtures.fake_quant import fake_quantized
from verl.utils.vllm.vllm_fp8_utils import mxfp8_layers
from verl.workers.rollout.quantization.npu_experts import experts_output

pytestmark = pytest.mark.feature("products")


def assert_rounded(output, expected):
    """Check equality with float64 `expected` up to rounding to bfloat16 and float32 sums."""
    error = np.abs(output.double().numpy() - expected)
    assert (error <= 2.0**-8 * np.abs(expected) + 1e-6 * np.abs(expected).max()).all(), error.max()


def test_linear_layers_after_every_update(tmp_path):
    first, *others = checkpoints(tmp_path, "qwen3")
    config = config_of(first)
    generator = torch.Generator().manual_seed(0)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first))
        for source in others:
            updates.send(weights_of(source))
            weights = packed(weights_of(source))
            layers = mxfp8_layers(model)
            assert len(layers) == 8
            for name, layer in layers.items():
                weight = weights[f"{canonical(name)}.weight"]
                x = torch.randn(5, weight.shape[1], generator=generator, dtype=torch.bfloat16)
                output, _ = layer(x.clone())
                assert output.dtype == torch.bfloat16
                assert_rounded(output, rounded(x) @ rounded(weight).T)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_dense_model_equals_a_fake_quantized_one(tmp_path, kind, tied):
    # The default std of transformers: a value on the other side of a rounding boundary changes little.
    first, *others = checkpoints(tmp_path, kind, tied=tied, std=0.02)
    config = config_of(first)
    ids = torch.randint(4, 100, (60,), generator=torch.Generator().manual_seed(0))
    with engine(config):
        model = in_float32(build_model(config))
        updates = Updates(model, config, scheme_of(first))
        for source in [*others, first]:
            updates.send(weights_of(source))
            actual = log_probs(model, ids)
            reference = fake_quantized(source)
            with torch.no_grad():
                expected = torch.log_softmax(reference(ids[None]).logits[0].double(), -1)
                plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids[None]).logits[0]
            difference = (actual - expected).abs()
            assert difference.mean() <= 5e-5
            assert difference.median() <= 1e-6
            assert (actual - torch.log_softmax(plain.double(), -1)).abs().mean() > 1e-3, "nothing was quantized"


def experts_by_hand(x, logits, w13, w2, top_k):
    """Compute every token with each of its experts, in float64 except for the operators' roundings."""
    scores = np.exp(logits.double().numpy())
    scores /= scores.sum(-1, keepdims=True)
    x, w13, w2 = rounded(x), rounded(w13), rounded(w2)
    total, largest = np.zeros((len(x), w2.shape[1])), 0.0
    for token in range(len(x)):
        chosen = np.argsort(-scores[token])[:top_k]
        weights = scores[token][chosen] / scores[token][chosen].sum()
        for expert, weight in zip(chosen, weights, strict=True):
            gate, up = np.split(w13[expert] @ x[token], 2)
            inner = rounded(torch.from_numpy(gate / (1 + np.exp(-gate)) * up)[None])[0]
            product = w2[expert] @ inner
            total[token] += weight * product
            largest = max(largest, np.abs(product).max())
    return total, largest


def test_experts_after_every_update(tmp_path):
    first, *others = checkpoints(tmp_path, "qwen3_moe")
    config = config_of(first)
    generator = torch.Generator().manual_seed(0)
    with engine(config):
        model = build_model(config)
        updates = Updates(model, config, scheme_of(first))
        for source in others:
            updates.send(weights_of(source))
            weights = packed(weights_of(source))
            layers = complete_experts(model)
            assert len(layers) == 2
            for name, layer in layers.items():
                x = torch.randn(9, 64, generator=generator, dtype=torch.bfloat16)
                logits = torch.randn(9, 4, generator=generator, dtype=torch.bfloat16)
                output = experts_output(layer, config, x, logits)
                w13, w2 = weights[f"{name}.w13_weight"], weights[f"{name}.w2_weight"]
                expected, largest = experts_by_hand(x, logits, w13, w2, 2)
                assert output.dtype == torch.bfloat16
                # An expert's output, its weight and their sum are rounded to bfloat16, each by 2**-8 at most.
                assert np.abs(output.double().numpy() - expected).max() <= 3 * 2.0**-8 * largest
