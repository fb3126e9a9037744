"""The emulated layers: their outputs, rejected cases, and a registration that keeps vllm-ascend's entries."""

import math

import pytest
import torch
from torch import nn

from verl.utils.vllm import ascend_cpu, plugin
from verl.utils.vllm.vllm_fp8_utils import (
    apply_mxfp8_transformation_after_loading,
    is_mxfp8_vllm_ascend,
    restore_mxfp8_weights_for_loading,
)
from verl.workers.rollout.quantization.mxfp4_layers import (
    apply_mxfp4_transformation_after_loading,
    restore_mxfp4_weights_for_loading,
)


def encoded(x):
    """Quantize x [N, K] to e4m3 codes uint8 and E8M0 bytes [N, ceil(K/32)], one number at a time in float64."""
    numbers = [(code, _e4m3(code)) for code in range(127)]
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    scales = torch.zeros(x.shape[0], math.ceil(x.shape[1] / 32), dtype=torch.uint8)
    for row, values in enumerate(x.double().tolist()):
        for group in range(scales.shape[1]):
            block = values[32 * group : 32 * group + 32]
            top = max(map(abs, block))
            byte = 0 if top == 0 else min(max(math.floor(math.log2(top)) - 8 + 127, 0), 254)
            scales[row, group] = byte
            for offset, value in enumerate(block):
                wanted = min(abs(value) / 2.0 ** (byte - 127), 448.0)
                # The nearest value; ties go to the even code.
                code = min(numbers, key=lambda pair: (abs(pair[1] - wanted), pair[0] % 2))[0]
                codes[row, 32 * group + offset] = code + 128 * (math.copysign(1, value) < 0)
    return codes, scales


def _e4m3(code):
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)


def decoded(codes, scales):
    out = torch.zeros(codes.shape, dtype=torch.float64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            code = int(codes[row, column])
            value = _e4m3(code & 127) * 2.0 ** (int(scales[row, column // 32]) - 127)
            out[row, column] = -value if code >= 128 else value
    return out


def linear(n, k, dtype=torch.float32, **attributes):
    layer = nn.Module()
    layer.quant_method = ascend_cpu.AscendCpuLinearMethod()
    layer.quant_method.create_weights(layer, k, [n], k, n, dtype, **attributes)
    return layer


def fill(layer, weight):
    codes, scales = encoded(weight)
    layer.weight.data.view(torch.uint8).copy_(codes)
    layer.weight_scale.data.copy_(scales)
    return codes, scales


@pytest.mark.parametrize("k", [64, 96, 80, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_multiplies_quantized_activations_with_quantized_weights(k, dtype):
    generator = torch.Generator().manual_seed(k)
    layer = linear(6, k, dtype)
    for update in range(2):
        x = torch.randn(3, k, generator=generator).to(dtype)
        weight, bias = torch.randn(6, k, generator=generator), torch.randn(6, generator=generator).to(dtype)
        restore_mxfp8_weights_for_loading(nn.Sequential(layer))
        pair = fill(layer, weight)
        if update:
            apply_mxfp8_transformation_after_loading(nn.Sequential(layer))
        else:
            layer.quant_method.process_weights_after_loading(layer)
        expected = decoded(*encoded(x)) @ decoded(*pair).T + bias.double()
        # bfloat16: the sum is rounded once.
        rounding = 1e-6 if dtype == torch.float32 else 2**-8
        result = layer.quant_method.apply(layer, x, bias)
        assert torch.allclose(result.double(), expected, rtol=rounding, atol=10 * rounding)


def test_the_layout_equals_vllm_ascends():
    layer = linear(6, 96)
    assert (layer.weight.shape, layer.weight.dtype) == ((6, 96), torch.float8_e4m3fn)
    assert (layer.weight_scale.shape, layer.weight_scale.dtype) == ((6, 3), torch.uint8)
    codes, scales = fill(layer, torch.randn(6, 96, generator=torch.Generator().manual_seed(0)))
    layer.quant_method.process_weights_after_loading(layer)
    assert (layer.weight.shape, layer.weight_scale.shape) == ((96, 6), (2, 6, 2))
    assert torch.equal(layer.weight.data.view(torch.uint8), codes.T)
    for row in range(6):
        for group in range(4):
            assert layer.weight_scale[group // 2, row, group % 2] == (scales[row, group] if group < 3 else 0)
    assert layer._mxfp8_transformed
    assert layer._mxfp8_original_shapes == {"weight": (6, 96), "weight_scale": (6, 3)}


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def mxfp4_linear(n, k, dtype=torch.float32):
    layer = nn.Module()
    layer.quant_method = ascend_cpu.AscendCpuMxfp4LinearMethod()
    layer.quant_method.create_weights(layer, k, [n], k, n, dtype)
    return layer


def fill_mxfp4(layer, generator):
    """Load random bytes; return the weight [N, K] that they mean, one number at a time."""
    layer.weight.data.copy_(torch.randint(0, 256, layer.weight.shape, generator=generator, dtype=torch.uint8))
    layer.weight_scale.data.copy_(
        torch.randint(120, 130, layer.weight_scale.shape, generator=generator, dtype=torch.uint8)
    )
    n, half = layer.weight.shape
    exact = torch.zeros(n, 2 * half, dtype=torch.float64)
    for row in range(n):
        for column in range(2 * half):
            code = int(layer.weight[row, column // 2]) >> 4 * (column % 2) & 15
            exact[row, column] = E2M1[code] * 2.0 ** (int(layer.weight_scale[row, column // 32]) - 127)
    return exact


@pytest.mark.parametrize("k", [64, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_linear_multiplies_quantized_activations_with_packed_weights(k, dtype):
    generator = torch.Generator().manual_seed(k)
    layer = mxfp4_linear(6, k, dtype)
    model = nn.Sequential(layer)
    for update in range(3):
        x = torch.randn(3, k, generator=generator).to(dtype)
        bias = torch.randn(6, generator=generator).to(dtype)
        restore_mxfp4_weights_for_loading(model)
        weight = fill_mxfp4(layer, generator)
        if update:
            apply_mxfp4_transformation_after_loading(model)
        else:
            layer.quant_method.process_weights_after_loading(layer)
        expected = decoded(*encoded(x)) @ weight.T + bias.double()
        rounding = 1e-6 if dtype == torch.float32 else 2**-8
        result = layer.quant_method.apply(layer, x, bias)
        assert torch.allclose(result.double(), expected, rtol=rounding, atol=100 * rounding)


def test_the_mxfp4_layout_equals_vllm_ascends():
    layer = mxfp4_linear(6, 128)
    assert (layer.weight.shape, layer.weight.dtype) == ((6, 64), torch.uint8)
    assert (layer.weight_scale.shape, layer.weight_scale.dtype) == ((6, 4), torch.uint8)
    fill_mxfp4(layer, torch.Generator().manual_seed(0))
    packed, scales = layer.weight.data.clone(), layer.weight_scale.data.clone()
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight.data, packed.T) and layer.weight_scale.shape == (2, 6, 2)
    for row in range(6):
        for group in range(4):
            assert layer.weight_scale[group // 2, row, group % 2] == scales[row, group]
    assert layer._mxfp4_transformed and not hasattr(layer, "_mxfp8_transformed")
    assert layer._mxfp4_original_shapes == {"weight": (6, 64), "weight_scale": (6, 4)}
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}


@pytest.mark.parametrize("k", [96, 80, 32])
def test_mxfp4_inputs_that_are_no_multiple_of_64_are_refused(k):
    with pytest.raises(ValueError, match=f"weight has {k} inputs, W4A8_MXFP takes multiples of 64"):
        mxfp4_linear(6, k)


def test_processing_twice_changes_nothing():
    layer = linear(6, 96)
    fill(layer, torch.randn(6, 96, generator=torch.Generator().manual_seed(0)))
    layer.quant_method.process_weights_after_loading(layer)
    before = layer.weight.data_ptr(), layer.weight.data.clone(), layer.weight_scale.data.clone()
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight.data_ptr() == before[0]
    assert torch.equal(layer.weight.data.view(torch.uint8), before[1].view(torch.uint8))
    assert torch.equal(layer.weight_scale.data, before[2])


def test_dequantized_weights_are_not_parameters():
    layer = linear(6, 96)
    layer.quant_method.process_weights_after_loading(layer)
    assert {name for name, _ in layer.named_parameters()} == {"weight", "weight_scale"}
    assert not list(layer.buffers())


def test_a_cut_inside_a_block_is_refused():
    layer = nn.Module()
    with pytest.raises(ValueError, match="160 inputs give 80 per rank, which is not a multiple of 32"):
        ascend_cpu.AscendCpuLinearMethod().create_weights(layer, 80, [6], 160, 6, torch.float32)


DESCRIPTION = {
    "quant_method": "ascend",
    "model.layers.0.self_attn.q_proj.weight": "W8A8_MXFP8",
    "model.layers.0.self_attn.k_proj.weight": "W8A8_MXFP8",
    "model.layers.0.self_attn.v_proj.weight": "W8A8_MXFP8",
    "model.layers.0.mlp.gate_proj.weight": "W8A8_MXFP8",
    "model.layers.0.mlp.up_proj.weight": "FLOAT",
    "model.layers.0.mlp.down_proj.weight": "FLOAT",
    "model.layers.0.self_attn.o_proj.weight": "W8A8_DYNAMIC",
    "model.layers.1.self_attn.q_proj.weight": "W8A8_MXFP8",
    "model.layers.1.self_attn.k_proj.weight": "W4A8_MXFP",
    "model.layers.1.self_attn.v_proj.weight": "W8A8_MXFP8",
    "model.layers.1.mlp.gate_proj.weight": "W4A8_MXFP",
    "model.layers.1.mlp.up_proj.weight": "W4A8_MXFP",
    "lm_head.weight": "FLOAT",
}


def method_of(prefix, description=DESCRIPTION):
    from vllm.model_executor.layers.linear import LinearBase

    config = ascend_cpu.AscendCpuConfig.from_config(description)
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    return config.get_quant_method(LinearBase.__new__(LinearBase), prefix)


def test_the_description_selects_the_layers():
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    assert isinstance(method_of("model.layers.0.self_attn.qkv_proj"), ascend_cpu.AscendCpuLinearMethod)
    assert isinstance(method_of("model.layers.0.mlp.down_proj"), UnquantizedLinearMethod)
    assert isinstance(method_of("model.layers.1.mlp.gate_up_proj"), ascend_cpu.AscendCpuMxfp4LinearMethod)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("model.layers.0.mlp.gate_up_proj", r"gate_proj.*up_proj.*must all be"),
        ("model.layers.0.self_attn.o_proj", r"o_proj.*W8A8_DYNAMIC"),
        ("model.layers.1.self_attn.qkv_proj", r"k_proj.*\['W4A8_MXFP', 'W8A8_MXFP8'\].*must all be"),
        ("model.layers.1.mlp.down_proj", r"no entry 'model\.layers\.1\.mlp\.down_proj\.weight'"),
    ],
)
def test_an_inconsistent_description_is_refused(prefix, message):
    with pytest.raises(ValueError, match=message):
        method_of(prefix)


def test_the_hooks_recognize_the_config():
    assert is_mxfp8_vllm_ascend(ascend_cpu.AscendCpuConfig(DESCRIPTION))
    mxfp4 = {"quant_method": "ascend", "model_quant_type": "W4A8_MXFP", "lm_head.weight": "FLOAT"}
    assert not is_mxfp8_vllm_ascend(ascend_cpu.AscendCpuConfig(mxfp4))


# ---- registration ----


@pytest.fixture
def registry(monkeypatch):
    """vLLM's registry without the entries of plugins."""
    from vllm.model_executor.layers import quantization

    names = [name for name in quantization.QUANTIZATION_METHODS if name != "ascend"]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", names)
    configs = dict(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG)
    configs.pop("ascend", None)
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", configs)
    return quantization


def test_ascend_is_registered_on_a_cpu_once(registry):
    plugin.register()
    plugin.register()
    assert registry.QUANTIZATION_METHODS.count("ascend") == 1
    assert registry.get_quantization_config("ascend") is ascend_cpu.AscendCpuConfig


def test_vllm_ascends_own_method_is_not_replaced(registry):
    class AscendModelSlimConfig(ascend_cpu.AscendCpuConfig):
        pass

    registry.register_quantization_config("ascend")(AscendModelSlimConfig)
    plugin.register()
    assert registry.get_quantization_config("ascend") is AscendModelSlimConfig


def test_nothing_is_registered_on_other_platforms(registry, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    ascend_cpu.register()
    assert "ascend" not in registry.QUANTIZATION_METHODS
