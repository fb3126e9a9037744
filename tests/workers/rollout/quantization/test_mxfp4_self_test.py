"""The self-test accepts the emulation's MXFP4 layers, and names each kind of fault.

The layers of vllm-ascend 0.28 and 0.30 are tested in tests/contract.
"""

import types

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from verl.utils.vllm.ascend_cpu import AscendCpuMxfp4LinearMethod, AscendCpuMxfp4MoEMethod
from verl.workers.rollout.quantization import mxfp4_layers
from verl.workers.rollout.quantization.mxfp4_self_test import run_mxfp4_self_test

RELEASE = "vllm-ascend 0.99.0"


def config(dtype=torch.float32):
    return types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=dtype))


class Linear(nn.Module):
    def __init__(self, n, k, dtype=torch.float32, method=AscendCpuMxfp4LinearMethod):
        super().__init__()
        self.quant_method = method()
        self.quant_method.create_weights(self, k, [n], k, n, dtype)
        self.quant_method.process_weights_after_loading(self)


class Row(Linear):
    """Another class of layers, as vLLM has one for each way to cut a layer."""


class Experts(nn.Module):
    """A layer with the attributes of vLLM's RoutedExperts that the method reads."""

    def __init__(self, count, hidden, inner, dtype=torch.float32, method=AscendCpuMxfp4MoEMethod):
        super().__init__()
        self.moe_config = types.SimpleNamespace(has_bias=False, experts_per_token=min(2, count))
        self.activation, self.expert_map, self.apply_router_weight_on_input = MoEActivation.SILU, None, False
        self.quant_method = method.__new__(method)
        self.quant_method.moe = self.moe_config
        self.quant_method.create_weights(self, count, hidden, inner, dtype)
        self.quant_method.process_weights_after_loading(self)


MODELS = {
    "linear": lambda dtype: Linear(48, 128, dtype),
    "one pair of groups": lambda dtype: Linear(3, 64, dtype),
    "many rows": lambda dtype: Linear(3000, 192, dtype),
    "experts": lambda dtype: Experts(6, 64, 128, dtype),
    "one expert": lambda dtype: Experts(1, 192, 64, dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_correct_layers_pass(make, dtype):
    model = nn.ModuleDict({"layer": make(dtype), "norm": nn.LayerNorm(4)})
    before = {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    run_mxfp4_self_test(model, config(dtype), RELEASE)
    after = {name: (p, p.data_ptr(), p.stride()) for name, p in model.named_parameters()}
    assert all(after[name][0] is parameter and after[name][1:] == (*at,) for name, (parameter, *at) in before.items())


def test_the_smallest_layer_of_each_class_is_tested():
    model = nn.ModuleDict({"large": Linear(64, 128), "small": Linear(32, 64), "row": Row(48, 128)})
    run_mxfp4_self_test(model, config(), RELEASE)
    tested = {name for name, layer in model.items() if layer.__dict__.get("_verl_mxfp4_record")}
    assert tested == {"small", "row"}


class Faulty:
    """Applies `fault` to a layer: the first transformation is that of the start, then follow those of two loads."""

    processed, damaged = 0, (2,)

    def _to_kernel_layout(self, layer):
        super()._to_kernel_layout(layer)
        self.processed += 1
        if self.processed in self.damaged:
            self.fault(layer)


class SwappedGroups(Faulty, AscendCpuMxfp4LinearMethod):
    def fault(self, layer):
        layer.weight_scale.data[0] = layer.weight_scale.data[0].flip(-1).clone()


class SwappedNibbles(Faulty, AscendCpuMxfp4LinearMethod):
    def fault(self, layer):
        layer.weight.data = (layer.weight.data % 16 * 16 + layer.weight.data // 16).t().contiguous().t()


class WrongWeight(Faulty, AscendCpuMxfp4LinearMethod):
    damaged = (3,)

    def fault(self, layer):
        layer.weight.data[3, 5] ^= 1


class OtherProduct(AscendCpuMxfp4LinearMethod):
    """Reads the two values of a byte in the other order, which no layout shows."""

    def _dequantize(self, values, scales, dtype, out):
        return super()._dequantize(values % 16 * 16 + values // 16, scales, dtype, out)


class OtherExperts(AscendCpuMxfp4MoEMethod):
    """Reads the rows of gate and up one further."""

    def apply(self, layer, x, topk_weights, topk_ids):
        w13 = layer._dequantized_w13_weight
        layer.__dict__["_dequantized_w13_weight"] = w13.roll(1, 1)
        return super().apply(layer, x, topk_weights, topk_ids)


FAULTS = {
    SwappedGroups: r"weight_scale: \d+ of \d+ bytes of the kernel layout are not those that load 1 wrote",
    SwappedNibbles: r"weight: \d+ of \d+ bytes of the kernel layout are not those that load 1 wrote",
    WrongWeight: r"weight: 1 of 3072 bytes of the kernel layout are not those that load 2 wrote",
    OtherProduct: r"the product with weight differs from that of the dequantized weights in \d+ of",
}


@pytest.mark.parametrize("method", FAULTS)
def test_a_fault_is_named(method):
    model = nn.ModuleDict({"down_proj": Linear(48, 128, method=method)})
    with pytest.raises(RuntimeError, match=rf"MXFP4 self-test failed in down_proj with {RELEASE}: {FAULTS[method]}"):
        run_mxfp4_self_test(model, config(), RELEASE)


def test_a_faulty_product_of_experts_is_named():
    model = nn.ModuleDict({"experts": Experts(4, 64, 128, method=OtherExperts)})
    with pytest.raises(RuntimeError, match=r"failed in experts .*the product with w13_weight and w2_weight differs"):
        run_mxfp4_self_test(model, config(), RELEASE)


def test_memory_that_moves_is_named(monkeypatch):
    """As if our hooks did not fit a release."""
    transform = mxfp4_layers._transform

    def moving(name, layer):
        transform(name, layer)
        layer.weight.data = layer.weight.data.t().clone().t()

    monkeypatch.setattr(mxfp4_layers, "_transform", moving)
    model = nn.ModuleDict({"down_proj": Linear(48, 128)})
    with pytest.raises(
        RuntimeError, match=r"weight moved in load 1: address, .* captured graphs would read the old memory"
    ):
        run_mxfp4_self_test(model, config(), RELEASE)
