"""Patches against the signatures of the vLLM releases they are for."""

import inspect
import logging
import sys
import types

import pytest
import torch
from torch import nn

from verl.utils.vllm import npu_vllm_patch
from verl.utils.vllm.layerwise import layer_info
from verl.utils.vllm.npu_vllm_patch import (
    Patch,
    apply_patches,
    loading_transposed,
    processing_reloaded,
    recording_layout,
    recording_transposition,
    restore_expert_parameters,
    rotary_init,
)


class KeywordBase(nn.Module):
    """`CustomOp` of vLLM 0.18, 0.23 and 0.32."""

    def __init__(self, *, enforce_enable: bool = False, compile_native: bool = False):
        super().__init__()
        self._enforce_enable = enforce_enable


class PlainBase(nn.Module):
    """`CustomOp` of releases before `enforce_enable`."""

    def __init__(self):
        super().__init__()
        self._enforce_enable = None


def rotary_class(base, patched=True):
    class ApplyRotaryEmb(base):
        def __init__(self, enforce_enable=False, is_neox_style=True, enable_fp32_compute=False):
            # The faulty code passes the argument by position.
            super().__init__(enforce_enable)

    if patched:
        ApplyRotaryEmb.__init__ = rotary_init(ApplyRotaryEmb)
    return ApplyRotaryEmb


def test_passing_the_argument_by_position_is_the_fault():
    with pytest.raises(TypeError, match="1 positional argument but 2 were given"):
        rotary_class(KeywordBase, patched=False)(True)


@pytest.mark.parametrize(("base", "expected"), [(KeywordBase, True), (PlainBase, None)])
def test_rotary_passes_enforce_enable_by_keyword_if_the_base_accepts_it(base, expected):
    made = rotary_class(base)(True, False, True)
    assert made._enforce_enable is expected
    assert (made.is_neox_style, made.enable_fp32_compute, made.apply_rotary_emb_flash_attn) == (False, True, None)


def test_rotary_works_for_a_subclass_like_vllm_ascends():
    parent = rotary_class(KeywordBase)

    class AscendApplyRotaryEmb(parent):
        def __init__(self, enforce_enable=False, is_neox_style=True, enable_fp32_compute=False):
            super().__init__(
                enforce_enable=enforce_enable, is_neox_style=is_neox_style, enable_fp32_compute=enable_fp32_compute
            )

    assert AscendApplyRotaryEmb(enforce_enable=True)._enforce_enable is True


def test_rotary_in_the_installed_vllm(monkeypatch):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.common import ApplyRotaryEmb

    monkeypatch.setattr(ApplyRotaryEmb, "__init__", rotary_init(ApplyRotaryEmb))
    with set_current_vllm_config(VllmConfig()):
        assert ApplyRotaryEmb(True)._enforce_enable is True


def modules(monkeypatch, **contents):
    for name, content in contents.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


COMMON = "vllm__model_executor__layers__rotary_embedding__common"


def rotary_patch():
    return tuple(patch for patch in npu_vllm_patch.PATCHES if patch.name == "ApplyRotaryEmb")


def test_a_patch_is_applied_and_logged_once(monkeypatch, caplog):
    modules(monkeypatch, **{COMMON: {"ApplyRotaryEmb": rotary_class(KeywordBase, patched=False), "find_spec": None}})
    with caplog.at_level(logging.INFO):
        assert apply_patches(rotary_patch()) == ["ApplyRotaryEmb"]
        assert apply_patches(rotary_patch()) == []
    assert "patched ApplyRotaryEmb (vLLM 0.13 to 0.25)" in caplog.text
    assert "skipped the patch of ApplyRotaryEmb" in caplog.text and "already patched" in caplog.text
    assert sys.modules[COMMON.replace("__", ".")].ApplyRotaryEmb(True)._enforce_enable is True


def test_an_outdated_patch_is_skipped_and_logged(caplog):
    """vLLM 0.32, installed here, needs neither of the first two, and there is no vllm-ascend for the others."""
    with caplog.at_level(logging.INFO):
        assert apply_patches() == []
    for name in (
        "ApplyRotaryEmb",
        "FusedMoE.weight_loader",
        "MXFP8 layouts",
        "MXFP8 layers in vLLM's layer-wise reload",
    ):
        assert f"skipped the patch of {name}" in caplog.text
    assert "checks for flash-attention's kernel" in caplog.text


def test_every_patch_states_releases_and_reason():
    assert all(patch.releases and patch.why for patch in npu_vllm_patch.PATCHES)


def test_an_error_inside_a_patch_is_not_hidden():
    def broken():
        raise AttributeError("no such thing")

    with pytest.raises(AttributeError):
        apply_patches((Patch("x", "all", "because", broken),))


# ---- unquantized experts ----


class FusedMoE:
    """Experts of vLLM before 0.24: the loader writes into [E, 2I, H] and [E, H, I]."""

    hidden_size = 8

    def weight_loader(self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False):
        inner = param.shape[1] // 2
        part = {"w1": slice(0, inner), "w3": slice(inner, 2 * inner), "w2": slice(None)}[shard_id]
        param.data[expert_id, part].copy_(loaded_weight)
        return return_success

    weight_loader.supports_moe_loading = True


class Experts(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        loader = object()
        for name, shape in (("w13_weight", (2, 2 * inner, hidden)), ("w2_weight", (2, hidden, inner))):
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))
            getattr(self, name).weight_loader = loader
        self.loader = loader


class AscendMethod:
    def process_weights_after_loading(self, layer):
        for name in ("w13_weight", "w2_weight"):
            data = getattr(layer, name).data.transpose(1, 2).contiguous()
            setattr(layer, name, nn.Parameter(data, requires_grad=False))


# 2I == H and I == H: a shape cannot tell which layout such a tensor is in.
@pytest.mark.parametrize(("hidden", "inner"), [(8, 4), (8, 8), (8, 6)])
def test_experts_load_in_either_layout(monkeypatch, hidden, inner):
    process = recording_transposition(AscendMethod.process_weights_after_loading)
    load = loading_transposed(FusedMoE.weight_loader)
    assert load.supports_moe_loading
    layer, moe, method = Experts(hidden, inner), FusedMoE(), AscendMethod()
    for update in range(3):
        generator = torch.Generator().manual_seed(update)
        w13 = torch.randn(2, 2 * inner, hidden, generator=generator)
        w2 = torch.randn(2, hidden, inner, generator=generator)
        for expert in range(2):
            assert load(moe, layer.w13_weight, w13[expert, :inner], "w", "w1", expert, return_success=True)
            load(moe, layer.w13_weight, w13[expert, inner:], "w", "w3", expert)
            load(moe, layer.w2_weight, w2[expert], "w", "w2", expert)
        process(method, layer)
        assert torch.equal(layer.w13_weight, w13.transpose(1, 2))
        assert torch.equal(layer.w2_weight, w2.transpose(1, 2))
        assert layer.w13_weight.weight_loader is layer.loader


def test_experts_replaced_by_wake_up_are_restored(monkeypatch):
    """vllm-ascend 0.18's wake_up makes new parameters of unquantized experts, transposed and without loaders."""

    def process(self, layer):
        for name in ("w13_weight", "w2_weight"):
            turned = layer._parameters[name].data.transpose(1, 2).contiguous()
            setattr(layer, name, torch.nn.Parameter(turned, requires_grad=False))

    layer = torch.nn.Module()
    for name, shape in {"w13_weight": (2, 8, 4), "w2_weight": (2, 4, 4)}.items():
        setattr(layer, name, torch.nn.Parameter(torch.rand(shape), requires_grad=False))
    recording_transposition(process)(None, layer)
    first = dict(layer._parameters)
    recording_transposition(process)(None, layer)  # a reload, on parameters that pass
    layer._parameters.update(first)
    layer.w2_weight = torch.nn.Parameter(layer.w2_weight.transpose(1, 2), requires_grad=False)
    model = torch.nn.Sequential(layer, torch.nn.Linear(2, 2))
    restore_expert_parameters(model)
    assert all(layer._parameters[name] is first[name] for name in first)


@pytest.mark.parametrize(("k", "scales"), [(96, 3), (80, 2), (4304, 134)])
def test_a_layer_that_would_lose_a_group_is_refused(k, scales):
    layer = torch.nn.Module()
    layer.prefix = "model.layers.0.mlp.down_proj"
    layer.weight, layer.weight_scale = torch.empty(6, k), torch.empty(6, scales)
    with pytest.raises(ValueError, match=rf"down_proj\.weight has {k} inputs .*{scales} scales.*0\.23\.0 or newer"):
        recording_layout(lambda self, layer: None, ("weight",))(None, layer)


# ---- MXFP8 layers in vLLM's layer-wise reload ----


class MXFP8Linear(nn.Module):
    """A layer with weights of 2 x 32, marked as transformed."""

    prefix = "model.layers.0.o_proj"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 32, dtype=torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
        self._mxfp8_transformed = True


def reloading(layer, weight, scale, numel=66):
    """Put vLLM's state of a layer where it is when a reload has received these two tensors."""

    def load(param, loaded_weight):
        raise AssertionError("the arguments are only recorded")

    info = layer_info(layer)
    info.kernel_tensors = (dict(layer._parameters), {})
    info.load_numel, info.load_numel_total = numel, 66
    signature = inspect.signature(load)
    for name, tensor in (("weight", weight), ("weight_scale", scale)):
        if tensor is not None:
            info.loaded_weights.append((name, signature.bind(getattr(layer, name), tensor)))


VALUES, SCALES = torch.zeros(2, 32, dtype=torch.float8_e4m3fn), torch.zeros(2, 1, dtype=torch.uint8)


def processed(process, **loaded):
    layer = MXFP8Linear()
    if loaded:
        reloading(layer, **loaded)
    processing_reloaded(process, ("weight",))(None, layer)
    return layer


def test_mark_is_removed_during_a_reload_only():
    seen = []
    processed(lambda self, layer: seen.append(layer._mxfp8_transformed))
    processed(lambda self, layer: seen.append(layer._mxfp8_transformed), weight=VALUES, scale=SCALES)
    assert seen == [True, False]


def test_layer_whose_processing_fails_stays_marked():
    """It gets its former tensors back, which have the kernel layout."""

    def fail(self, layer):
        layers.append(layer)
        raise RuntimeError("no memory")

    layers = []
    with pytest.raises(RuntimeError, match="no memory"):
        processed(fail, weight=VALUES, scale=SCALES)
    assert layers[0]._mxfp8_transformed


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ({"weight": VALUES.bfloat16(), "scale": SCALES}, r"weight: received torch\.bfloat16, expected"),
        ({"weight": VALUES, "scale": SCALES.float()}, r"weight_scale: received torch\.float32, expected torch\.uint8"),
        ({"weight": VALUES, "scale": None}, r"weight_scale: received nothing"),
        ({"weight": None, "scale": SCALES}, r"weight: received nothing"),
        ({"weight": VALUES, "scale": SCALES, "numel": 65}, r"received 65 of 66 elements"),
    ],
)
def test_reload_without_all_values_and_scales_is_refused(loaded, message):
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.o_proj.*{message}.*quantization_side=receiver"):
        processed(lambda self, layer: pytest.fail("it was processed"), **loaded)
