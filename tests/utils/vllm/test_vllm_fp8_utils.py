"""The hooks against layers that behave like each vllm-ascend release, and like the emulation on a CPU.

The releases' own code, under a stand-in for torch_npu, is in tests/contract; these stand-ins do, in a few lines, what
was read there.
"""

import itertools
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from verl.utils.vllm.npu_vllm_patch import recording_layout
from verl.utils.vllm.vllm_fp8_utils import (
    MXFP8_BLOCK_QUANT_KWARGS,
    apply_mxfp8_transformation_after_loading,
    check_kernel_layouts,
    is_mxfp8_vllm_ascend,
    kernel_layout_targets,
    mxfp8_layers,
    restore_kernel_parameters,
    restore_mxfp8_weights_for_loading,
)


def groups(k):
    return -(-k // 32)


class Scheme018:
    """vllm-ascend 0.18: the kernel layout is a view of the loaded tensors; no marks, no restore; even counts only."""

    def __init__(self, keys):
        self.keys = keys
        self.process_weights_after_loading = recording_layout(type(self).process, keys).__get__(self)

    def process(self, layer):
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            scale.data = scale.data.reshape(*scale.shape[:-1], scale.shape[-1] // 2, 2).transpose(-2, -3)
            weight.data = weight.data.transpose(-1, -2)


class Scheme023:
    """vllm-ascend 0.23: copies and marks; its restore reshapes scales, which moves them and fails for an odd number."""

    def __init__(self, keys):
        self.keys = keys

    def process_weights_after_loading(self, layer):
        if getattr(layer, "_mxfp8_transformed", False):
            return
        if not hasattr(layer, "_mxfp8_original_shapes"):
            names = [name for key in self.keys for name in (key, f"{key}_scale")]
            layer._mxfp8_original_shapes = {name: tuple(getattr(layer, name).shape) for name in names}
        self.transform(layer)
        layer._mxfp8_transformed = True

    def transform(self, layer):
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            padded = nn.functional.pad(scale.data, (0, scale.shape[-1] % 2))
            scale.data = padded.reshape(*scale.shape[:-1], -1, 2).transpose(-2, -3).contiguous()
            weight.data = weight.data.transpose(-1, -2).contiguous()

    def restore_weights_for_rl_loading(self, layer):
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            weight.data = weight.data.transpose(-1, -2)
            scale.data = scale.data.transpose(-2, -3).reshape(layer._mxfp8_original_shapes[f"{key}_scale"])
        layer._mxfp8_transformed = False


class Scheme026(Scheme023):
    """vllm-ascend 0.26: separate buffers for the kernel layout of a linear layer."""

    restored = 0

    def transform(self, layer):
        super().transform(layer)
        if not hasattr(layer, "_mxfp8_weight_buf"):
            layer._mxfp8_weight_buf, layer._mxfp8_scale_buf = layer.weight.data, layer.weight_scale.data
        else:
            layer._mxfp8_weight_buf.copy_(layer.weight.data)
            layer._mxfp8_scale_buf.copy_(layer.weight_scale.data)
        layer.weight.data, layer.weight_scale.data = layer._mxfp8_weight_buf, layer._mxfp8_scale_buf

    def restore_weights_for_rl_loading(self, layer):
        self.restored += 1
        super().restore_weights_for_rl_loading(layer)


class Scheme028(Scheme026):
    """vllm-ascend 0.28: a row-parallel share that begins or ends inside a group is padded; the restore ignores that."""

    padding = (0, 0)

    def transform(self, layer):
        layer.mxfp8_tp_padding = self.padding
        layer.weight.data = nn.functional.pad(layer.weight.data, self.padding)
        super().transform(layer)


class ExpertsScheme(Scheme023):
    """Experts of vllm-ascend 0.23 and 0.26: views of the loaded tensors, marks, and a restore."""

    transform = Scheme018.process


class Method:
    """vllm-ascend's wrapper of a scheme."""

    def __init__(self, scheme):
        self.quant_method = scheme

    def process_weights_after_loading(self, layer):
        self.quant_method.process_weights_after_loading(layer)


def emulation(keys):
    from verl.utils.vllm.ascend_cpu import AscendCpuLinearMethod, AscendCpuMoEMethod

    cls = AscendCpuLinearMethod if keys == ("weight",) else AscendCpuMoEMethod
    method = cls.__new__(cls)
    method.keys = keys
    return method


METHODS = {
    "0.18": lambda keys: Method(Scheme018(keys)),
    "0.23": lambda keys: Method((Scheme023 if keys == ("weight",) else ExpertsScheme)(keys)),
    "0.26": lambda keys: Method((Scheme026 if keys == ("weight",) else ExpertsScheme)(keys)),
    "cpu": emulation,
}


class Layer(nn.Module):
    """Parameters as vLLM makes them before loading, [.., N, K] for each key."""

    def __init__(self, method, shapes):
        super().__init__()
        self.quant_method = method
        self._mx_compute_dtype = torch.float32
        for key, shape in shapes.items():
            scale_shape = (*shape[:-1], groups(shape[-1]))
            self.register_parameter(key, parameter(shape, torch.float8_e4m3fn))
            self.register_parameter(f"{key}_scale", parameter(scale_shape, torch.uint8))


def parameter(shape, dtype):
    made = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    made.weight_loader = lambda param, loaded: param.data.copy_(loaded)
    return made


def linear(release, n, k):
    return Layer(METHODS[release](("weight",)), {"weight": (n, k)})


def experts(release, hidden, inner):
    shapes = {"w13_weight": (2, 2 * inner, hidden), "w2_weight": (2, hidden, inner)}
    return Layer(METHODS[release](tuple(shapes)), shapes)


def load(layer, seed):
    """Write new values through the loader of every parameter; return them by name."""
    generator = torch.Generator().manual_seed(seed)
    sent = {}
    for name, param in layer.named_parameters():
        # 127 is e4m3's NaN, 255 E8M0's: neither is ever sent.
        numbers = torch.randint(0, 127, param.shape, generator=generator, dtype=torch.uint8)
        sent[name] = numbers.view(torch.float8_e4m3fn) if param.dtype == torch.float8_e4m3fn else numbers
        param.weight_loader(param, sent[name])
    return sent


def assembled(weight, scale):
    """The kernel layout, element by element."""
    *lead, n, k = weight.shape
    count = scale.shape[-1]
    run_weight = np.zeros((*lead, k, n), np.uint8)
    run_scale = np.zeros((*lead, (count + 1) // 2, n, 2), np.uint8)
    codes, scale = weight.view(torch.uint8).numpy(), scale.numpy()
    for index in itertools.product(*map(range, lead)):
        for row, column in itertools.product(range(n), range(k)):
            run_weight[(*index, column, row)] = codes[(*index, row, column)]
        for row, group in itertools.product(range(n), range(count)):
            run_scale[(*index, group // 2, row, group % 2)] = scale[(*index, row, group)]
    return torch.from_numpy(run_weight), torch.from_numpy(run_scale)


def same(layer, sent):
    for name in [name for name in sent if not name.endswith("_scale")]:
        run_weight, run_scale = assembled(sent[name], sent[f"{name}_scale"])
        assert torch.equal(getattr(layer, name).data.contiguous().view(torch.uint8), run_weight)
        assert torch.equal(getattr(layer, f"{name}_scale").data, run_scale)


def addresses(layer):
    return {name: (p.data_ptr(), p.shape, p.stride()) for name, p in layer.named_parameters()}


LINEAR = [
    (release, k)
    for release, k in itertools.product(METHODS, (32, 64, 96, 80, 144, 4304))
    if release != "0.18" or k in (64,)
]
# The first transformation is the release's own: 0.23 and 0.26 fail there where an expert has an odd number of groups.
EXPERTS = [("0.18", 64, 128), ("0.23", 64, 128), ("0.26", 128, 64)]
EXPERTS += [("cpu", hidden, inner) for hidden, inner in ((64, 64), (96, 80), (96, 48), (64, 32))]
CASES = [pytest.param(lambda r=r, k=k: linear(r, 3, k), id=f"{r}-linear-{k}") for r, k in LINEAR]
CASES += [pytest.param(lambda r=r, h=h, i=i: experts(r, h, i), id=f"{r}-experts-{h}-{i}") for r, h, i in EXPERTS]


@pytest.mark.parametrize("make", CASES)
def test_every_update_keeps_the_addresses_of_the_first_weights(make):
    layer = make()
    model = nn.Sequential(nn.Linear(2, 2), layer)
    load_layout = {name: (p.shape, id(p), p.weight_loader) for name, p in layer.named_parameters()}
    sent = load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    same(layer, sent)
    first = addresses(layer)
    for update in range(1, 5):
        restore_mxfp8_weights_for_loading(model)
        assert {name: (p.shape, id(p), p.weight_loader) for name, p in layer.named_parameters()} == load_layout
        sent = load(layer, update)
        apply_mxfp8_transformation_after_loading(model)
        same(layer, sent)
        assert addresses(layer) == first


@pytest.mark.parametrize("make", CASES)
def test_every_element_can_be_written_through_its_kernel_layout_target(make):
    layer = make()
    model = nn.Sequential(nn.Linear(2, 2), layer)
    load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    restore_mxfp8_weights_for_loading(model)
    sent = load(layer, 1)
    targets = {target.name: target for _, target in kernel_layout_targets(model)}
    load(layer, 2)
    apply_mxfp8_transformation_after_loading(model)
    assert targets.keys() == {f"1.{name}" for name in sent}
    for name, values in sent.items():
        target = targets[f"1.{name}"]
        raw = values.view(torch.uint8).flatten()
        target.memory().view(torch.uint8)[target.offsets(torch.arange(len(raw)))] = raw
    same(layer, sent)


@pytest.mark.parametrize("make", CASES)
def test_both_hooks_are_idempotent_and_inverse(make):
    layer = make()
    sent = load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    first = addresses(layer)
    restore_mxfp8_weights_for_loading(layer)
    restore_mxfp8_weights_for_loading(layer)
    for name, value in sent.items():
        assert torch.equal(getattr(layer, name).data.contiguous().view(torch.uint8), value.view(torch.uint8))
    apply_mxfp8_transformation_after_loading(layer)
    apply_mxfp8_transformation_after_loading(layer)
    same(layer, sent)
    assert addresses(layer) == first


def test_no_decision_depends_on_shapes():
    """Square weights, and experts with equal sizes, have the same shape in both layouts."""
    for layer in (linear("0.23", 64, 64), experts("0.23", 64, 32 * 2), experts("cpu", 64, 32)):
        load(layer, 0)
        layer.quant_method.process_weights_after_loading(layer)
        restore_mxfp8_weights_for_loading(layer)
        sent = load(layer, 1)
        apply_mxfp8_transformation_after_loading(layer)
        same(layer, sent)


@pytest.mark.parametrize(("k", "used"), [(64, True), (96, False)])
def test_a_releases_own_restore_is_used_if_it_is_correct(k, used):
    layer = linear("0.26", 6, k)
    layer.quant_method.process_weights_after_loading(layer)
    restore_mxfp8_weights_for_loading(layer)
    assert layer.quant_method.quant_method.restored == used


def test_experts_replaced_by_wake_up_get_their_loaders_back():
    layer = experts("0.18", 64, 128)
    load(layer, 0)
    layer.quant_method.process_weights_after_loading(layer)
    first = addresses(layer)
    for name in ("w13_weight", "w2_weight"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).transpose(1, 2), requires_grad=False))
    restore_mxfp8_weights_for_loading(layer)
    sent = load(layer, 1)
    apply_mxfp8_transformation_after_loading(layer)
    same(layer, sent)
    assert addresses(layer) == first


def test_memory_replaced_between_updates_is_refused():
    model = nn.ModuleDict({"down_proj": linear("0.23", 6, 64)})
    layer = model["down_proj"]
    layer.quant_method.process_weights_after_loading(layer)
    restore_mxfp8_weights_for_loading(model)
    apply_mxfp8_transformation_after_loading(model)
    layer.weight_scale.data = layer.weight_scale.data.clone()
    with pytest.raises(RuntimeError, match=r"down_proj\.weight: its memory was replaced"):
        restore_mxfp8_weights_for_loading(model)


def test_an_unknown_layout_is_refused():
    model = nn.ModuleDict({"down_proj": linear("0.23", 6, 64)})
    layer = model["down_proj"]
    layer.quant_method.process_weights_after_loading(layer)
    layer.weight_scale.data = layer.weight_scale.data.flatten(1)
    with pytest.raises(RuntimeError, match=r"down_proj\.weight.*not supported"):
        restore_mxfp8_weights_for_loading(model)


def padded(n, k, before, after):
    scheme = Scheme028(("weight",))
    scheme.padding = (before, after)
    return Layer(Method(scheme), {"weight": (n, k)})


@pytest.mark.parametrize(("k", "before", "after"), [(48, 16, 0), (48, 0, 16), (40, 8, 16), (80, 0, 16)])
def test_padded_shares_are_restored_without_their_padding(k, before, after):
    layer = padded(6, k, before, after)
    load(layer, 0)
    model = nn.ModuleDict({"down_proj": layer})
    layer.quant_method.process_weights_after_loading(layer)
    addresses = [p.data_ptr() for p in layer.parameters()]
    for seed in range(1, 4):
        restore_mxfp8_weights_for_loading(model)
        assert layer.weight.shape == (6, k)
        by_name = {target.name: target for _, target in kernel_layout_targets(model)}
        sent = load(layer, seed)
        apply_mxfp8_transformation_after_loading(model)
        weight, scale = assembled(**{name.replace("weight_scale", "scale"): value for name, value in sent.items()})
        assert torch.equal(layer.weight.view(torch.uint8)[before : before + k], weight)
        assert not layer.weight.view(torch.uint8)[:before].any()
        assert not layer.weight.view(torch.uint8)[before + k :].any()
        assert torch.equal(layer.weight_scale, scale)
        assert [p.data_ptr() for p in layer.parameters()] == addresses
        # A delta changes single elements at these positions.
        target = by_name["down_proj.weight"]
        found = target.memory()[target.offsets(torch.arange(6 * k))]
        assert torch.equal(found.view(torch.uint8), sent["weight"].view(torch.uint8).flatten())


def test_padded_share_with_too_few_scales_is_refused():
    """56 inputs after 24 of padding touch three groups; the release holds two scales."""
    layer = padded(6, 56, 24, 16)
    layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(RuntimeError, match=r"down_proj\.weight: 56 inputs after 24 .* need 3 scales, .* holds 2"):
        restore_mxfp8_weights_for_loading(nn.ModuleDict({"down_proj": layer}))


@pytest.fixture
def ascend_model(monkeypatch):
    """Return a model with one MXFP8 layer of vllm-ascend, and a function that sets the format of its tensors."""

    class AscendW8A8MXFP8DynamicLinearMethod(Scheme026):
        pass

    formats = {}
    stand_in = types.SimpleNamespace(get_npu_format=lambda tensor: formats.get(tensor.data_ptr(), 2))
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    layer = Layer(Method(AscendW8A8MXFP8DynamicLinearMethod(("weight",))), {"weight": (6, 64)})
    layer.quant_method.process_weights_after_loading(layer)
    model = nn.ModuleDict({"down_proj": layer, "norm": nn.LayerNorm(4)})
    return model, lambda tensor, number: formats.update({tensor.data_ptr(): number})


@pytest.mark.parametrize("number", [0, 2, 30])
def test_strided_memory_formats_are_accepted(ascend_model, number):
    """New tensors with four or five dimensions have the formats 0 and 30."""
    model, set_format = ascend_model
    set_format(model["down_proj"].weight_scale, number)
    check_kernel_layouts(model)
    restore_mxfp8_weights_for_loading(model)
    apply_mxfp8_transformation_after_loading(model)


@pytest.mark.parametrize("key", ["down_proj.weight", "down_proj.weight_scale", "norm.weight"])
@pytest.mark.parametrize(("number", "name"), [(29, "FRACTAL_NZ"), (4, "FRACTAL_Z"), (99, "unknown")])
def test_other_memory_formats_are_refused_before_anything_changes(ascend_model, key, number, name):
    model, set_format = ascend_model
    set_format(model.get_parameter(key), number)
    for check in (check_kernel_layouts, restore_mxfp8_weights_for_loading, restore_kernel_parameters):
        with pytest.raises(RuntimeError, match=rf"{key}: .*{name} \({number}\), expected ND .*weight_nz_mode=0"):
            check(model)
        assert model["down_proj"]._mxfp8_transformed


def test_format_is_read_again_after_an_update(ascend_model):
    model, set_format = ascend_model
    restore_mxfp8_weights_for_loading(model)
    set_format(model["norm"].weight, 29)
    with pytest.raises(RuntimeError, match=r"norm\.weight: its memory format is FRACTAL_NZ"):
        apply_mxfp8_transformation_after_loading(model)


def test_a_release_without_marks_needs_the_plugin():
    class AscendW8A8MXFP8DynamicLinearMethod:
        pass

    layer = linear("0.23", 6, 64)
    layer.quant_method.quant_method = AscendW8A8MXFP8DynamicLinearMethod()
    with pytest.raises(RuntimeError, match=r"0: .*VLLM_PLUGINS"):
        restore_mxfp8_weights_for_loading(nn.Sequential(layer))


def test_unquantized_layers_are_not_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    restore_mxfp8_weights_for_loading(model)
    apply_mxfp8_transformation_after_loading(model)
    assert mxfp8_layers(model) == {}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def config(module, name, description):
    made = type(name, (), {"__module__": module})()
    made.quant_description = description
    return made


DESCRIBED = {**MXFP8_BLOCK_QUANT_KWARGS, "model.layers.0.mlp.down_proj.weight": "W8A8_MXFP8"}
RELEASE = "vllm_ascend.quantization.modelslim_config"


def test_is_mxfp8_vllm_ascend():
    assert is_mxfp8_vllm_ascend(config(RELEASE, "AscendModelSlimConfig", DESCRIBED))
    assert is_mxfp8_vllm_ascend(config("verl.utils.vllm.ascend_cpu", "AscendCpuConfig", DESCRIBED))
    subclass = type("Mine", (type(config(RELEASE, "AscendModelSlimConfig", None)),), {})()
    subclass.quant_description = DESCRIBED
    assert is_mxfp8_vllm_ascend(subclass)


@pytest.mark.parametrize(
    "other",
    [
        None,
        {},
        object(),
        config("vllm.model_executor.layers.quantization.fp8", "Fp8Config", DESCRIBED),
        config(RELEASE, "AscendModelSlimConfig", None),
        config(RELEASE, "AscendModelSlimConfig", {**DESCRIBED, "quant_method": "fp8"}),
        config(RELEASE, "AscendModelSlimConfig", {"quant_method": "ascend", "a.weight": "W8A8_DYNAMIC"}),
    ],
    ids=["none", "dict", "object", "another config", "no description", "another method", "another type"],
)
def test_is_not_mxfp8_vllm_ascend(other):
    assert not is_mxfp8_vllm_ascend(other)
