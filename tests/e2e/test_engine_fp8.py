"""fp8 in blocks of 128 x 128 in a real vLLM engine on the CPU, updated by the same transaction as other weights."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fixtures.engine import log_probs_of, weights_of
from verl.config import RolloutConfig
from verl.workers.weight_sync.manifest import WeightUpdateError

pytestmark = pytest.mark.e2e

ROLLOUT = RolloutConfig(quantization="fp8", dtype="bfloat16", tensor_model_parallel_size=1)
SIZES = dict(hidden_size=192, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
DOWN = "model.layers.0.mlp.down_proj.weight"


def round_trip(x, rows, columns):
    """Quantize x [N, K] to e4m3 block by block and back, in float64; the scale is rounded to float32, as it is sent."""
    out = torch.zeros_like(x)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            tile = x[top : top + rows, left : left + columns].double()
            scale = (tile.abs().max() / 448).float().double()
            if scale == 0:
                continue
            ratio = tile / scale
            _, exponent = torch.frexp(ratio)
            step = torch.exp2(((exponent - 1).clamp(min=-6) - 3).double())
            values = (torch.round(ratio / step) * step).clamp(-448, 448)
            out[top : top + rows, left : left + columns] = (values * scale).to(x.dtype)
    return out


def fake_quantized(model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.weight.data = round_trip(module.weight.data, 128, 128)
            module.register_forward_pre_hook(lambda _, inputs: (activations(inputs[0]),))
    return model


def activations(x):
    return round_trip(x.flatten(0, -2), 1, 128).view(x.shape)


def bf16(model_dir):
    return {name: tensor.bfloat16() for name, tensor in weights_of(model_dir).items()}


@pytest.fixture
def models(tiny_models):
    """Directories of three models with different weights."""
    return tiny_models(3, kind="qwen3", tied=True, std=0.05, **SIZES)


def test_the_engine_computes_with_the_weights_of_the_last_update(models, engines):
    first, second, third = models
    engine, scheme = engines.get(first, ROLLOUT, dtype="bfloat16")
    addresses = engine.rpc("verl_parameter_addresses")
    for number, source in enumerate([second, third, first, second]):
        engine.update(scheme.encode(bf16(source).items()), bucket_bytes=20_000 if number % 2 else 1 << 24)
        layer = dict(engine.model.named_modules())["model.layers.0.mlp.down_proj"]
        assert torch.equal(layer._dequantized_weight, round_trip(bf16(source)[DOWN], 128, 128))
        responses, log_probs = engine.sample(tokens=10)
        difference = (log_probs - log_probs_of(fake_quantized(source), responses)).abs().mean()
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        assert difference < (log_probs - log_probs_of(plain, responses)).abs().mean()
        stale = fake_quantized({second: third}.get(source, second))
        assert difference < 0.1 * (log_probs - log_probs_of(stale, responses)).abs().mean()
        assert engine.rpc("verl_parameter_addresses") == addresses


FAULTS = {
    "scales missing": (f"{DOWN}_scale_inv", lambda _: None, rf"{DOWN}.*scales.*did not arrive"),
    "scales of another shape": (f"{DOWN}_scale_inv", lambda s: s[:, :-1], rf"{DOWN}_scale_inv.*of shape"),
    "a scale that is NaN": (f"{DOWN}_scale_inv", lambda s: s * float("nan"), rf"{DOWN}_scale_inv.*NaN"),
}


def test_a_damaged_weight_is_named_and_a_full_update_repairs_the_engine(models, engines):
    first, second, _ = models
    engine, scheme = engines.get(first, ROLLOUT, dtype="bfloat16")
    for name, change, message in FAULTS.values():
        encoded = {key: change(t) if key == name else t for key, t in scheme.encode(bf16(second).items())}
        with pytest.raises(WeightUpdateError, match=message):
            engine.update((key, t) for key, t in encoded.items() if t is not None)
    rest = {key: tensor for key, tensor in bf16(second).items() if key != DOWN}
    with pytest.raises(WeightUpdateError, match=r"not written, the first is 'model\.layers\.0\.mlp\.down_proj"):
        engine.update(scheme.encode(rest.items()))
    engine.update(scheme.encode(bf16(second).items()))
    layer = dict(engine.model.named_modules())["model.layers.0.mlp.down_proj"]
    assert torch.equal(layer._dequantized_weight, round_trip(bf16(second)[DOWN], 128, 128))
