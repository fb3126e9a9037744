"""The hooks for MXFP4 layers against layers that behave like vllm-ascend 0.28, and like the emulation on a CPU.

The releases' own code, under a stand-in for torch_npu, is in tests/contract. There memory is permuted; here it is not.
"""

import itertools

import pytest
import torch
from torch import nn

from verl.utils.vllm.vllm_fp8_utils import mxfp8_layers
from verl.workers.rollout.quantization.mxfp4_layers import (
    apply_mxfp4_transformation_after_loading,
    check_mxfp4_kernel_layouts,
    mxfp4_layers,
    mxfp4_targets,
    refresh_mxfp4_after_delta,
    restore_mxfp4_weights_for_loading,
)


class Scheme028:
    """vllm-ascend 0.28: a new tensor for a weight, a view for its scales, marks. Its restore is not used."""

    def __init__(self, keys):
        self.keys = keys
        self.runs = 0

    def process_weights_after_loading(self, layer):
        if getattr(layer, "_mxfp4_transformed", False):
            return
        self.runs += 1
        names = [name for key in self.keys for name in (key, f"{key}_scale")]
        if not hasattr(layer, "_mxfp4_original_shapes"):
            layer._mxfp4_original_shapes = {name: tuple(getattr(layer, name).shape) for name in names}
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            weight.data = self.cast(weight.data).transpose(-1, -2)
            scale.data = scale.data.reshape(*scale.shape[:-1], scale.shape[-1] // 2, 2).transpose(-3, -2)
        layer._mxfp4_transformed = True

    def cast(self, weight):
        return weight.clone()


class Method:
    """vllm-ascend's wrapper of a scheme."""

    def __init__(self, scheme):
        self.quant_method = scheme

    def process_weights_after_loading(self, layer):
        self.quant_method.process_weights_after_loading(layer)


def emulation(keys):
    from verl.utils.vllm.ascend_cpu import AscendCpuMxfp4LinearMethod, AscendCpuMxfp4MoEMethod

    cls = AscendCpuMxfp4LinearMethod if keys == ("weight",) else AscendCpuMxfp4MoEMethod
    return cls.__new__(cls)


METHODS = {"0.28": lambda keys: Method(Scheme028(keys)), "cpu": emulation}


class Layer(nn.Module):
    """Parameters as vLLM makes them before loading, [.., N, K/2] for each key."""

    def __init__(self, method, shapes):
        super().__init__()
        self.quant_method = method
        self._mx_compute_dtype = torch.float32
        for key, (*rows, k) in shapes.items():
            self.register_parameter(key, parameter((*rows, k // 2)))
            self.register_parameter(f"{key}_scale", parameter((*rows, k // 32)))


def parameter(shape):
    made = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    made.weight_loader = lambda param, loaded: param.data.copy_(loaded)
    made.output_dim = 0
    return made


def linear(release, n, k):
    return Layer(METHODS[release](("weight",)), {"weight": (n, k)})


def experts(release, hidden, inner):
    shapes = {"w13_weight": (2, 2 * inner, hidden), "w2_weight": (2, hidden, inner)}
    return Layer(METHODS[release](tuple(shapes)), shapes)


CASES = [pytest.param(lambda r=r, k=k: linear(r, 3, k), id=f"{r}-linear-{k}") for r in METHODS for k in (64, 192)]
CASES += [pytest.param(lambda r=r: experts(r, 64, 128), id=f"{r}-experts") for r in METHODS]


def load(layer, seed):
    """Write new values through the loader of every parameter; return them by name."""
    generator = torch.Generator().manual_seed(seed)
    sent = {}
    for name, param in layer.named_parameters():
        # 255 is E8M0's NaN: it is never sent.
        sent[name] = torch.randint(0, 255, param.shape, generator=generator, dtype=torch.uint8)
        assert param.output_dim == 0
        param.weight_loader(param, sent[name])
    return sent


def same(layer, sent):
    """Compare every byte of the kernel layout with its documented position."""
    for name in [name for name in sent if not name.endswith("_scale")]:
        weight, scale = sent[name], sent[f"{name}_scale"]
        found, found_scale = getattr(layer, name).data, getattr(layer, f"{name}_scale").data
        assert found.shape == (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
        for index in itertools.product(*map(range, weight.shape)):
            *lead, row, column = index
            assert found[(*lead, column, row)] == weight[index]
        assert found_scale.shape == (*scale.shape[:-2], scale.shape[-1] // 2, scale.shape[-2], 2)
        for index in itertools.product(*map(range, scale.shape)):
            *lead, row, group = index
            assert found_scale[(*lead, group // 2, row, group % 2)] == scale[index]


def addresses(layer):
    return {name: (id(p), p.data_ptr(), p.shape, p.stride()) for name, p in layer.named_parameters()}


@pytest.mark.parametrize("make", CASES)
def test_every_update_keeps_parameters_and_addresses_of_the_first_weights(make):
    layer = make()
    model = nn.Sequential(nn.Linear(2, 2), layer)
    sent = load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    check_mxfp4_kernel_layouts(model)
    same(layer, sent)
    first, checkpoint = addresses(layer), {name: part.shape for name, part in sent.items()}
    assert set(mxfp4_layers(model)) == {"1"} and not mxfp8_layers(model)
    for update in range(1, 4):
        for _ in range(2):  # the second call has no effect
            restore_mxfp4_weights_for_loading(model)
        assert {name: p.shape for name, p in layer.named_parameters()} == checkpoint
        sent = load(layer, update)
        for _ in range(2):
            apply_mxfp4_transformation_after_loading(model)
        same(layer, sent)
        assert addresses(layer) == first


@pytest.mark.parametrize("make", CASES)
def test_elements_are_changed_through_targets_and_a_refresh(make):
    layer = make()
    model = nn.Sequential(nn.Linear(2, 2), layer)
    load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    restore_mxfp4_weights_for_loading(model)
    sent = load(layer, 1)
    targets = {target.name: target for _, target in mxfp4_targets(model)}
    apply_mxfp4_transformation_after_loading(model)
    first = addresses(layer)
    assert targets.keys() == {f"1.{name}" for name in sent}
    changed = {}
    for name in sent:
        target = targets[f"1.{name}"]
        assert (target.kernel_tensor.data_ptr(), target.layer) == (getattr(layer, name).data_ptr(), "1")
        indices = torch.arange(0, sent[name].numel(), 3)
        target.memory()[target.offsets(indices)] = 7
        sent[name].view(-1)[indices] = 7
        changed[name] = indices
    refresh_mxfp4_after_delta(model, {"1": changed})
    same(layer, sent)
    assert addresses(layer) == first


def test_layers_without_changes_are_not_transformed_again():
    first, second = linear("0.28", 3, 64), linear("0.28", 3, 64)
    model = nn.Sequential(first, second)
    for layer in model:
        load(layer, 0)
        layer.quant_method.process_weights_after_loading(layer)
    restore_mxfp4_weights_for_loading(model)
    for layer in model:
        load(layer, 1)
    apply_mxfp4_transformation_after_loading(model)
    runs = [layer.quant_method.quant_method.runs for layer in model]
    refresh_mxfp4_after_delta(model, {"1": {"weight": torch.tensor([0])}, "0": {"weight_scale": torch.tensor([0])}})
    assert [layer.quant_method.quant_method.runs for layer in model] == [runs[0], runs[1] + 1]


def transformed(scheme_class, n=3, k=64):
    layer = Layer(Method(scheme_class(("weight",))), {"weight": (n, k)})
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class Contiguous(Scheme028):
    """A release that copies scales instead of viewing them."""

    def process_weights_after_loading(self, layer):
        super().process_weights_after_loading(layer)
        layer.weight_scale.data = layer.weight_scale.data.contiguous()


class Untransposed(Scheme028):
    """A release with another kernel layout."""

    def cast(self, weight):
        return weight.transpose(-1, -2)


class Padded(Scheme028):
    """Memory with padding, as FRACTAL_NZ has for rows that do not fill a block."""

    def cast(self, weight):
        return torch.cat([weight, weight])[: len(weight)]


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Contiguous, r"1\.weight: the checkpoint shapes \[3, 64\] and \[3, 4\] became .* is not supported"),
        (Untransposed, r"became \[3, 64\] and .*expected .*is not supported"),
        (Padded, r"1\.weight: 3 outputs take 384 bytes for 192, so its memory is padded"),
    ],
)
def test_unknown_layout_is_refused(scheme, message):
    with pytest.raises(RuntimeError, match=message):
        check_mxfp4_kernel_layouts(nn.Sequential(nn.Linear(2, 2), transformed(scheme, k=128)))


def test_layout_that_changes_is_refused_and_weights_stay():
    layer = transformed(Scheme028)
    model = nn.Sequential(layer)
    restore_mxfp4_weights_for_loading(model)
    before = layer.__dict__["_verl_mxfp4_record"]["weight"].kernel_weight.clone()
    load(layer, 1)
    layer.quant_method.quant_method.cast = lambda weight: weight.t().contiguous().t()
    with pytest.raises(
        RuntimeError, match=r"0\.weight: its layout became .*this release of vllm-ascend is not supported"
    ):
        apply_mxfp4_transformation_after_loading(model)
    assert torch.equal(layer.weight.data, before)


def test_moved_memory_is_refused():
    layer = transformed(Scheme028)
    model = nn.Sequential(layer)
    check_mxfp4_kernel_layouts(model)
    layer.weight.data = layer.weight.data.clone()
    with pytest.raises(RuntimeError, match=r"0\.weight: its memory was replaced after the load"):
        restore_mxfp4_weights_for_loading(model)


def test_a_release_without_marks_is_refused():
    class AscendW4A8MXFPDynamicLinearMethod(Scheme028):
        """The name of the release's class, without what 0.28 added."""

        def process_weights_after_loading(self, layer):
            return

    layer = transformed(AscendW4A8MXFPDynamicLinearMethod)
    for call in (mxfp4_layers, restore_mxfp4_weights_for_loading, check_mxfp4_kernel_layouts):
        with pytest.raises(RuntimeError, match=r"0 is W4A8_MXFP, and this release .* install vllm-ascend 0\.28\.0"):
            call(nn.Sequential(layer))
