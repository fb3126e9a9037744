"""Layout changes of MXFP8 layers around a weight update: back to the checkpoint layout, and on to the kernel layout.

The layers are vllm-ascend's or those of `ascend_cpu`. Both carry the same two marks, and no decision depends on the
shape of a tensor:

- `layer._mxfp8_transformed`: True in the kernel layout;
- `layer._mxfp8_original_shapes`: the shape of each parameter in the checkpoint layout.

| parameter | checkpoint layout | kernel layout |
|---|---|---|
| weight | [N, K] float8_e4m3fn | [K, N] |
| weight_scale | [N, ceil(K/32)] uint8 | [ceil(K/64), N, 2], an odd number of groups padded with a zero |
| w13_weight, w2_weight and their scales | the same with the number of experts in front | |

vllm-ascend 0.28 and later pad a row-parallel weight with zeros if its share of K does not begin or end at the border of
a group: `layer.mxfp8_tp_padding` is the number of zeros before and after it, and the kernel layout has K + both rows.

Between updates a layer uses the tensors of the first load, so their addresses never change and captured graphs stay
valid. A weight is loaded directly into that memory, through a transposed view. Scales (one byte per 32 weights) are
copied if padding or order allow no view. Parameter objects are kept, because vLLM stores `weight_loader` on them.

vllm-ascend's own hooks (0.19.1rc1 and later) are used if they are correct: for linear layers with separate buffers
(0.26), an even number of groups and no padding. Earlier hooks move the scales; odd numbers of groups and padded weights
raise.

An NPU can hold a tensor in a format that its strides do not describe; `memory_formats` checks the formats before and
after each update. Layers in MXFP4 (W4A8_MXFP) are
in verl.workers.rollout.quantization.mxfp4_layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from verl.utils.quantization.formats import ASCEND_METHOD, MX_BLOCK_SIZE, MXFP8_DESCRIPTION, W8A8_MXFP8
from verl.utils.vllm.layout_map import Target
from verl.utils.vllm.memory_formats import MXFP8_SCHEMES, ascend_scheme, check_memory_formats

MXFP8_BLOCK_QUANT_KWARGS: dict[str, Any] = dict(MXFP8_DESCRIPTION)
_SCALE = "_scale"
_RECORD = "_verl_mxfp8_record"
_ASCEND_CONFIGS = {("vllm_ascend", "AscendModelSlimConfig"), ("verl", "AscendCpuConfig")}


def is_mxfp8_vllm_ascend(quant_config: Any) -> bool:
    """Return True if a vLLM quantization config is vllm-ascend's or its CPU emulation's and describes MXFP8 layers.

    Nothing is imported: a config of vllm-ascend's class exists only after its module was imported.
    """
    classes = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(quant_config).__mro__}
    if classes.isdisjoint(_ASCEND_CONFIGS):
        return False
    description = getattr(quant_config, "quant_description", None)
    if not isinstance(description, Mapping) or description.get("quant_method") != ASCEND_METHOD:
        return False
    return W8A8_MXFP8 in description.values()


class MXFP8Layer(nn.Module):
    """Type of a layer with the two marks. vLLM's own classes carry them; this class is never instantiated.

    Attributes:
        _mxfp8_transformed: True in the kernel layout.
        _mxfp8_original_shapes: shapes of weights and scales in the checkpoint layout, by parameter name.
        quant_method: vLLM's quantization method of the layer.
    """

    _mxfp8_transformed: bool
    _mxfp8_original_shapes: dict[str, tuple[int, ...]]
    quant_method: Any


@dataclass
class _Pair:
    """A weight with its scales: vLLM's parameters, and the tensors in kernel layout.

    `rows` are the rows of the kernel weight without padding.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    kernel_weight: torch.Tensor
    kernel_scale: torch.Tensor
    groups: int
    rows: slice

    @property
    def unpadded_weight(self) -> torch.Tensor:
        """The part [..., K, N] of the kernel weight that a checkpoint's weight is written to."""
        return self.kernel_weight[..., self.rows, :]

    def checkpoint_scale(self) -> torch.Tensor:
        """Return the scales in checkpoint layout: a copy, or a view if there is only one pair of groups."""
        return scales_in_checkpoint_layout(self.kernel_scale, self.groups)


def scales_in_checkpoint_layout(kernel_scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Convert uint8 scales [..., ceil(groups / 2), N, 2] in kernel layout to [..., N, groups]."""
    if kernel_scale.device.type == "cpu" and kernel_scale.is_contiguous():
        # Pairs of bytes are moved as one, which halves the work of a transposing copy.
        pairs = kernel_scale.view(torch.int16).squeeze(-1).transpose(-1, -2).contiguous()
        return pairs.view(torch.uint8)[..., :groups]
    return kernel_scale.transpose(-2, -3).flatten(-2)[..., :groups]


def mxfp8_layers(model: nn.Module) -> dict[str, MXFP8Layer]:
    """Return the MXFP8 layers of a model by name.

    Raises:
        RuntimeError: a layer of vllm-ascend has no mark: the release sets none (0.18.0), and the patch that adds them
            was not applied before the model was loaded.
    """
    found: dict[str, MXFP8Layer] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "_mxfp8_transformed"):
            found[name] = cast(MXFP8Layer, layer)
        elif type(ascend_scheme(layer)).__name__ in MXFP8_SCHEMES:
            raise RuntimeError(
                f"{name}: this release of vllm-ascend does not record the layout of the layer's weights, and verl's "
                "plugin, which records it, was not loaded before the model: VLLM_PLUGINS must be unset or include verl"
            )
    return found


def check_kernel_layouts(model: nn.Module) -> None:
    """Check layouts and memory formats of a model's MXFP8 layers, before the first update.

    Raises:
        RuntimeError: a layout or a format in which weights cannot be replaced; names the parameter.
    """
    for name, layer in mxfp8_layers(model).items():
        _record(name, layer)
    check_memory_formats(model)


def restore_mxfp8_weights_for_loading(model: nn.Module) -> None:
    """Bring every MXFP8 layer into the checkpoint layout. No effect on a layer that already has it.

    Raises:
        RuntimeError: a layout or a memory format in which weights cannot be replaced. Nothing was changed then.
    """
    layers = mxfp8_layers(model)
    check_memory_formats(model)
    for name, layer in layers.items():
        if layer._mxfp8_transformed:
            _restore(name, layer)


def apply_mxfp8_transformation_after_loading(model: nn.Module) -> None:
    """Bring every MXFP8 layer into the kernel layout, at its previous addresses. No effect if it already has it."""
    for name, layer in mxfp8_layers(model).items():
        if not layer._mxfp8_transformed:
            _apply(name, layer)
    check_memory_formats(model)


def kernel_layout_targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
    """Return, for each weight and scale of the MXFP8 layers, the tensor that loaders write and its kernel location.

    The layers must be in the checkpoint layout.
    """
    found = []
    for name, layer in mxfp8_layers(model).items():
        for key, pair in _record(name, layer).items():
            shape = layer._mxfp8_original_shapes[key]
            strides = pair.unpadded_weight.transpose(-1, -2).stride()
            weight_steps = zip(_flat(shape), shape, strides, strict=True)
            target = Target.kernel_layout(f"{name}.{key}", name, pair.unpadded_weight, weight_steps)
            found.append((pair.weight.data, target))
            *rows, groups = shape = layer._mxfp8_original_shapes[key + _SCALE]
            *lead, pairs, row, parity = pair.kernel_scale.stride()
            row_steps = zip(_flat(shape)[:-1], rows, (*lead, row), strict=True)
            # A single group has no parity: with a step for it, two dimensions would share the stride 1.
            steps = (*row_steps, (2, -(-groups // 2), pairs), (1, min(groups, 2), parity))
            found.append(
                (pair.scale.data, Target.kernel_layout(f"{name}.{key}{_SCALE}", name, pair.kernel_scale, steps))
            )
    return found


def restore_kernel_parameters(model: nn.Module) -> None:
    """Restore the parameters in kernel layout of MXFP8 layers, if waking up replaced them.

    Raises:
        RuntimeError: as `restore_mxfp8_weights_for_loading`.
    """
    layers = mxfp8_layers(model)
    check_memory_formats(model)
    for name, layer in layers.items():
        if layer._mxfp8_transformed:
            _own_parameters_back(layer, _record(name, layer))


def refresh_after_delta(model: nn.Module, indices: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Notify MXFP8 layers that keep data derived from their weights about the changed elements.

    Args:
        indices: by layer and parameter, int64 indices into the flattened parameter in checkpoint layout.
    """
    for name, changed in indices.items():
        layer = model.get_submodule(name)
        refresh = getattr(getattr(layer, "quant_method", None), "refresh_after_delta", None)
        if refresh is not None and hasattr(layer, "_mxfp8_transformed"):
            refresh(layer, changed)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def record_kernel_layout(layer: MXFP8Layer, load_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Mark a layer after its first transformation to the kernel layout.

    Args:
        load_shapes: shapes of its weights and scales in checkpoint layout, by parameter name.
    """
    layer._mxfp8_original_shapes = {name: tuple(shape) for name, shape in load_shapes.items()}
    layer._mxfp8_transformed = True
    _record(type(layer).__name__, layer)


def _record(name: str, layer: MXFP8Layer) -> dict[str, _Pair]:
    """Return the record of a layer. Create it if missing, which requires the kernel layout."""
    record = layer.__dict__.get(_RECORD)
    if record is None:
        shapes = getattr(layer, "_mxfp8_original_shapes", None)
        if shapes is None:
            raise RuntimeError(f"{name} is marked as MXFP8, but the shapes of its weights were not recorded")
        record = {key: _pair(name, layer, key, shapes) for key in shapes if not key.endswith(_SCALE)}
        # Bypasses nn.Module.__setattr__: a dictionary of parameters is bookkeeping, not a part of the model.
        layer.__dict__[_RECORD] = record
    return record


def _pair(name: str, layer: MXFP8Layer, key: str, shapes: Mapping[str, tuple[int, ...]]) -> _Pair:
    weight, scale = getattr(layer, key), getattr(layer, key + _SCALE)
    *lead, n, k = shapes[key]
    groups = shapes[key + _SCALE][-1]
    before, after = vars(layer).get("mxfp8_tp_padding", (0, 0))
    pair = _Pair(weight, scale, weight.data, scale.data, groups, slice(before, before + k))
    expected = ((*lead, before + k + after, n), (*lead, -(-groups // 2), n, 2))
    if not weight.numel():
        raise RuntimeError(
            f"{name}.{key}: vllm-ascend has released these weights, because its fused experts use copies that no "
            "update reaches; remove actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.enable_fused_mc2"
        )
    if (tuple(weight.shape), tuple(scale.shape)) != expected:
        raise RuntimeError(
            f"{name}.{key}: the checkpoint shapes {list(shapes[key])} and {list(shapes[key + _SCALE])} became "
            f"{list(weight.shape)} and {list(scale.shape)} in kernel layout, expected {expected}: the layout of this "
            "release of vllm-ascend is not supported"
        )
    needed = -(-(before + k + after) // MX_BLOCK_SIZE)
    if groups != needed:
        raise RuntimeError(
            f"{name}.{key}: {k} inputs after {before} zeros of padding need {needed} scales, but this release of "
            f"vllm-ascend holds {groups}; use another tensor_model_parallel_size, or leave the layer out "
            "(actor_rollout_ref.rollout.quantization_config_file)"
        )
    return pair


def _release_restores(layer: MXFP8Layer) -> bool:
    """Return True if the release's own hooks keep a layer's addresses and its scales correct."""
    scheme = ascend_scheme(layer)
    own_buffers = hasattr(layer, "_mxfp8_weight_buf") and hasattr(layer, "_mxfp8_scale_buf")
    if not own_buffers or not hasattr(scheme, "restore_weights_for_rl_loading"):
        return False
    if any(vars(layer).get("mxfp8_tp_padding", ())):
        return False
    return all(shape[-1] % 2 == 0 for key, shape in layer._mxfp8_original_shapes.items() if key.endswith(_SCALE))


def _restore(name: str, layer: MXFP8Layer) -> None:
    record = _record(name, layer)
    _own_parameters_back(layer, record)
    for key, pair in record.items():
        current = (pair.weight.data_ptr(), pair.scale.data_ptr())
        if current != (pair.kernel_weight.data_ptr(), pair.kernel_scale.data_ptr()):
            raise RuntimeError(
                f"{name}.{key}: its memory was replaced after the load; captured graphs would use the old memory"
            )
    if _release_restores(layer):
        ascend_scheme(layer).restore_weights_for_rl_loading(layer)
        return
    for pair in record.values():
        pair.weight.data = pair.unpadded_weight.transpose(-1, -2)
        pair.scale.data = pair.checkpoint_scale()
    layer._mxfp8_transformed = False


def _own_parameters_back(layer: MXFP8Layer, record: Mapping[str, _Pair]) -> None:
    """Restore the parameters: vllm-ascend 0.18.0 wakes experts up as new ones without loaders, in the same memory."""
    for key, pair in record.items():
        for name, parameter in ((key, pair.weight), (key + _SCALE, pair.scale)):
            if layer._parameters[name] is not parameter:
                layer._parameters[name] = parameter


def _apply(name: str, layer: MXFP8Layer) -> None:
    record = layer.__dict__.get(_RECORD)
    if record is None:
        # The first transformation: the release does it.
        layer.quant_method.process_weights_after_loading(layer)
        _record(name, layer)
    elif _release_restores(layer):
        ascend_scheme(layer).process_weights_after_loading(layer)
    else:
        for pair in record.values():
            loaded, run = pair.scale.data, pair.kernel_scale
            if loaded.untyped_storage().data_ptr() != run.untyped_storage().data_ptr():
                padded = nn.functional.pad(loaded, (0, 2 * run.shape[-3] - pair.groups))
                run.transpose(-2, -3).copy_(padded.unflatten(-1, (-1, 2)))
            pair.weight.data, pair.scale.data = pair.kernel_weight, run
        layer._mxfp8_transformed = True
    refresh = getattr(layer.quant_method, "refresh_after_loading", None)
    if refresh is not None:
        refresh(layer)
