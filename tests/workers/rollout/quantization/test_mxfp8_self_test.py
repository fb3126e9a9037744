"""The self-test accepts the emulation's layers, leaves them as they were, and names each kind of fault.

The layers of each vllm-ascend release are tested in tests/contract.
"""

import copy
import types

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from verl.utils.vllm.ascend_cpu import AscendCpuLinearMethod, AscendCpuMoEMethod
from verl.workers.rollout.quantization.mxfp8_self_test import run_self_test

RELEASE = "vllm-ascend 0.99.0"


def config(dtype=torch.float32):
    return types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=dtype))


class Linear(nn.Module):
    def __init__(self, n, k, dtype=torch.float32, method=AscendCpuLinearMethod):
        super().__init__()
        self.quant_method = method()
        self.quant_method.create_weights(self, k, [n], k, n, dtype)
        fill(self)


class Row(Linear):
    """Another class of layers, as vLLM has one for each way to cut a layer."""


class Experts(nn.Module):
    """A layer with the attributes of vLLM's RoutedExperts that the method reads."""

    def __init__(self, count, hidden, inner, top_k=2, dtype=torch.float32, method=AscendCpuMoEMethod):
        super().__init__()
        self.moe_config = types.SimpleNamespace(has_bias=False, experts_per_token=top_k)
        self.activation, self.expert_map, self.apply_router_weight_on_input = MoEActivation.SILU, None, False
        self.quant_method = method.__new__(method)
        self.quant_method.moe = self.moe_config
        self.quant_method.create_weights(self, count, hidden, inner, dtype)
        fill(self)


def fill(layer):
    generator = torch.Generator().manual_seed(11)
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).copy_(torch.randint(100, 120, parameter.shape, generator=generator))
    layer.quant_method.process_weights_after_loading(layer)


def state(model):
    return {
        name: (p, p.data_ptr(), p.stride(), p.data.view(torch.uint8).clone()) for name, p in model.named_parameters()
    }


def assert_unchanged(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (parameter, address, strides, values) in before.items():
        assert after[name][0] is parameter and after[name][1:3] == (address, strides)
        assert torch.equal(after[name][3], values)


MODELS = {
    "even groups": lambda dtype: Linear(48, 128, dtype),
    "odd groups": lambda dtype: Linear(48, 96, dtype),
    "partial groups": lambda dtype: Linear(200, 80, dtype),
    "one group": lambda dtype: Linear(3, 32, dtype),
    "many rows": lambda dtype: Linear(3000, 64, dtype),
    "experts": lambda dtype: Experts(6, 64, 128, dtype=dtype),
    "experts, odd groups": lambda dtype: Experts(3, 96, 32, 1, dtype=dtype),
    "experts, partial groups": lambda dtype: Experts(1, 80, 48, 1, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_correct_layers_pass_and_are_unchanged(make, dtype):
    model = nn.ModuleDict({"layer": make(dtype), "norm": nn.LayerNorm(4)})
    before = state(model)
    made = {key: value.clone() for key, value in vars(model["layer"]).items() if key.startswith("_dequantized")}
    assert made
    run_self_test(model, config(dtype), RELEASE)
    assert_unchanged(model, before)
    assert all(torch.equal(vars(model["layer"])[key], value) for key, value in made.items())


def test_the_smallest_layer_of_each_kind_is_tested():
    loads = []

    class Recording(AscendCpuLinearMethod):
        def refresh_after_loading(self, layer):
            loads.append(layer)
            super().refresh_after_loading(layer)

    sizes = {"large": (64, 128), "small": (32, 64), "odd": (32, 96), "partial": (32, 80)}
    model = nn.ModuleDict({name: Linear(*size, method=Recording) for name, size in sizes.items()})
    model["row"] = Row(48, 128, method=Recording)
    loads.clear()
    run_self_test(model, config(), RELEASE)
    names = {id(layer): name for name, layer in model.items()}
    # Two loads, and the old weights.
    assert sorted(names[id(layer)] for layer in loads) == sorted(["small", "odd", "partial", "row"] * 3)


class Faulty(AscendCpuLinearMethod):
    """Applies `fault` to a layer: the first transformation is that of the start, then follow those of two loads."""

    processed, damaged = 0, (2,)

    def refresh_after_loading(self, layer):
        self.processed += 1
        if self.processed in self.damaged:
            self.fault(layer)
        super().refresh_after_loading(layer)


class SwappedGroups(Faulty):
    def fault(self, layer):
        layer.weight_scale.data[0] = layer.weight_scale.data[0].flip(-1).clone()


class LostPadding(Faulty):
    def fault(self, layer):
        layer.weight_scale.data[-1, :, 1] = 7


class WrongWeight(Faulty):
    def fault(self, layer):
        layer.weight.data.view(torch.uint8)[3, 5] ^= 1


class SecondLoadLost(Faulty):
    """Keeps what the first load wrote."""

    damaged = (2, 3)

    def fault(self, layer):
        if self.processed == 2:
            self.kept = layer.weight.data.clone()
        else:
            layer.weight.data.view(torch.uint8).copy_(self.kept.view(torch.uint8))


class MovedScale(Faulty):
    def fault(self, layer):
        self.old = layer.weight_scale.data  # keeps the memory, so that the copy has another address
        layer.weight_scale.data = layer.weight_scale.data.clone()


class WrongGroupInProduct(AscendCpuLinearMethod):
    """Multiplies with the last group of inputs left out."""

    def apply(self, layer, x, bias=None):
        return super().apply(layer, torch.cat([x[:, :-32], torch.zeros_like(x[:, -32:])], 1), bias)


class NoNumberInProduct(AscendCpuLinearMethod):
    def apply(self, layer, x, bias=None):
        return super().apply(layer, x, bias) * torch.nan


class LostWeights(Faulty):
    """Damages the weights when they are put back."""

    damaged = (4,)

    def fault(self, layer):
        layer.weight.data.view(torch.uint8)[0, 0] ^= 1


FAULTS = {
    SwappedGroups: r"weight_scale: \d+ of 192 bytes of the kernel layout are not those that load 1 wrote",
    LostPadding: r"weight_scale: 48 of 192 bytes of the kernel layout are not those that load 1 wrote",
    WrongWeight: r"weight: 1 of 4608 bytes of the kernel layout are not those that load 1 wrote",
    SecondLoadLost: r"weight: \d+ of 4608 bytes of the kernel layout are not those that load 2 wrote",
    MovedScale: r"weight_scale moved in load 1: address, .* captured graphs would read the old memory",
    WrongGroupInProduct: r"the product with weight differs from that of the dequantized weights in \d+ of 192 elements",
    NoNumberInProduct: r"the product with weight differs .* in 192 of 192 elements, for example nan instead of",
    LostWeights: r"the layer did not get its weights back: 1 bytes of weight differ",
}


@pytest.mark.parametrize(("method", "message"), FAULTS.items(), ids=[method.__name__ for method in FAULTS])
def test_fault_is_named_and_the_layer_is_put_back(method, message):
    model = nn.ModuleDict({"good": Row(48, 96), "down_proj": Linear(48, 96, method=method)})
    before = state(model)
    with pytest.raises(
        RuntimeError, match=rf"self-test failed in down_proj with {RELEASE}: .*{message}.*use another release "
    ):
        run_self_test(model, config(), RELEASE)
    if method is not LostWeights:
        assert_unchanged(model, before)


def test_both_faults_are_named_if_the_layer_does_not_get_its_weights_back():
    method = type("Both", (WrongWeight,), {"damaged": (2, 3)})
    model = nn.ModuleDict({"down_proj": Linear(48, 96, method=method)})
    with pytest.raises(RuntimeError, match=r"load 1 wrote; besides, the layer did not get its weights back: 1 bytes"):
        run_self_test(model, config(), RELEASE)


class WrongExpert(AscendCpuMoEMethod):
    """Exchanges two experts in products only."""

    def apply(self, layer, x, topk_weights, topk_ids):
        return super().apply(layer, x, topk_weights, (topk_ids + 1) % layer.w13_weight.shape[0])


class HalvesExchanged(AscendCpuMoEMethod):
    """Takes gate for up."""

    def refresh_after_loading(self, layer):
        super().refresh_after_loading(layer)
        made = vars(layer)["_dequantized_w13_weight"]
        made.copy_(made.roll(made.shape[1] // 2 + 1, 1))


class WrongScaleOfW2(AscendCpuMoEMethod):
    """Multiplies with the scales of the neighboring group."""

    def refresh_after_loading(self, layer):
        scales = layer.w2_weight_scale.data
        right = copy.deepcopy(scales)
        scales.copy_(scales.flip(1))
        super().refresh_after_loading(layer)
        scales.copy_(right)


@pytest.mark.parametrize("method", [WrongExpert, HalvesExchanged, WrongScaleOfW2])
def test_wrong_product_of_experts_is_named(method):
    model = nn.ModuleDict({"experts": Experts(4, 64, 128, method=method)})
    before = state(model)
    with pytest.raises(RuntimeError, match=r"failed in experts .*the product with w13_weight and w2_weight differs"):
        run_self_test(model, config(), RELEASE)
    assert_unchanged(model, before)


def test_product_of_experts_with_another_activation_is_not_compared(caplog):
    layer = Experts(4, 64, 128, method=WrongExpert)
    layer.activation = MoEActivation.GELU
    with caplog.at_level("INFO"):
        run_self_test(nn.ModuleDict({"experts": layer}), config(), RELEASE)
    assert "compares no product of experts" in caplog.text


def test_error_of_the_release_is_named():
    class Raising(AscendCpuLinearMethod):
        def apply(self, layer, x, bias=None):
            raise IndexError("no such operator")

    model = nn.ModuleDict({"up_proj": Linear(8, 64, method=Raising)})
    before = state(model)
    with pytest.raises(RuntimeError, match=rf"failed in up_proj with {RELEASE}: no such operator"):
        run_self_test(model, config(), RELEASE)
    assert_unchanged(model, before)


def test_model_without_quantized_layers_passes():
    run_self_test(nn.Sequential(nn.Linear(2, 2)), config(), RELEASE)
