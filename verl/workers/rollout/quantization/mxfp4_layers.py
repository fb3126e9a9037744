"""Layout changes of MXFP4 layers (W4A8_MXFP) around a weight update: load, transform, copy into the engine's memory.

The layers are vllm-ascend's (0.28.0rc1 and later) or those of `ascend_cpu`. Both carry the marks of the release,
`_mxfp4_transformed` and `_mxfp4_original_shapes`, which mean the same as those of MXFP8 (`vllm_fp8_utils`).

| parameter | checkpoint layout | kernel layout |
|---|---|---|
| weight | [N, K/2] uint8, two values in a byte | [K/2, N], on an NPU in FRACTAL_NZ |
| weight_scale | [N, K/32] uint8 | [K/64, N, 2], a view of the same memory |
| w13_weight, w2_weight and their scales | the same with the number of experts in front | |

Single elements of a weight in FRACTAL_NZ cannot be written, and the release's own restore and transformation move the
weights, so that captured graphs would keep reading the old ones. So each weight has a buffer in host memory, in the
checkpoint layout: a full update loads it, and a delta changes elements of it. Then the release transforms a copy of it
on the device, and the result is copied into the memory of the first load, from one tensor in FRACTAL_NZ to another. The
engine's parameters are never replaced or moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from verl.utils.vllm.layout_map import Target
from verl.utils.vllm.memory_formats import (
    MXFP4_SCHEMES,
    ascend_scheme,
    check_memory_formats,
    format_name,
    memory_format,
)

_SCALE = "_scale"
_RECORD = "_verl_mxfp4_record"


class MXFP4Layer(nn.Module):
    """Type of a layer with the two marks. vLLM's own classes carry them; this class is never instantiated.

    Attributes:
        _mxfp4_transformed: True in the kernel layout.
        _mxfp4_original_shapes: shapes of weights and scales in the checkpoint layout, by parameter name.
        quant_method: vLLM's quantization method of the layer.
    """

    _mxfp4_transformed: bool
    _mxfp4_original_shapes: dict[str, tuple[int, ...]]
    quant_method: Any


@dataclass
class _Pair:
    """A weight with its scales: vLLM's parameters, the tensors in kernel layout, and the parameter to load into.

    `memory_format` is torch_npu's number of the kernel weight's format, None on a CPU. `loaded` exists from the first
    update on.
    """

    weight: nn.Parameter
    scale: nn.Parameter
    kernel_weight: torch.Tensor
    kernel_scale: torch.Tensor
    shape: tuple[int, ...]
    memory_format: int | None
    loaded: nn.Parameter | None = None

    def loaded_weight(self) -> nn.Parameter:
        """Return the parameter in host memory that loaders write to, with the attributes of vLLM's."""
        if self.loaded is None:
            self.loaded = nn.Parameter(torch.empty(self.shape, dtype=torch.uint8, device="cpu"), requires_grad=False)
            self.loaded.__dict__.update(vars(self.weight))
        return self.loaded

    def checkpoint_scale(self) -> torch.Tensor:
        """Return the scales in checkpoint layout, a view of the memory that kernels read."""
        return _checkpoint_scale(self.kernel_scale)


def _checkpoint_scale(kernel_scale: torch.Tensor) -> torch.Tensor:
    return kernel_scale.transpose(-2, -3).flatten(-2)


def _is_view_of_loaded(kernel_scale: torch.Tensor) -> bool:
    """Return whether scales in kernel layout are a view of contiguous memory in checkpoint layout."""
    scale = _checkpoint_scale(kernel_scale)
    return scale.data_ptr() == kernel_scale.data_ptr() and scale.is_contiguous()


def mxfp4_layers(model: nn.Module) -> dict[str, MXFP4Layer]:
    """Return the MXFP4 layers of a model by name.

    Raises:
        RuntimeError: a layer of vllm-ascend has no mark: the release is too old to replace its weights.
    """
    found: dict[str, MXFP4Layer] = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "_mxfp4_transformed"):
            found[name] = cast(MXFP4Layer, layer)
        elif type(ascend_scheme(layer)).__name__ in MXFP4_SCHEMES:
            raise RuntimeError(
                f"{name} is W4A8_MXFP, and this release of vllm-ascend does not record the layout of its weights: "
                "install vllm-ascend 0.28.0 or newer, or use W8A8_MXFP8"
            )
    return found


def check_mxfp4_kernel_layouts(model: nn.Module) -> None:
    """Check layouts and memory of a model's MXFP4 layers, before the first update.

    Raises:
        RuntimeError: a layout in which weights cannot be replaced; names the parameter.
    """
    layers = mxfp4_layers(model)
    for name, layer in layers.items():
        _record(name, layer)
    if layers:
        check_memory_formats(model)


def restore_mxfp4_weights_for_loading(model: nn.Module) -> None:
    """Bring every MXFP4 layer into the checkpoint layout: host memory for weights, a view for scales.

    No effect on a layer that already has it.

    Raises:
        RuntimeError: a layout in which weights cannot be replaced, or memory that was moved.
    """
    layers = mxfp4_layers(model)
    if layers:
        check_memory_formats(model)
    for name, layer in layers.items():
        if layer._mxfp4_transformed:
            _restore(name, layer)


def apply_mxfp4_transformation_after_loading(model: nn.Module) -> None:
    """Bring every MXFP4 layer into the kernel layout, at its previous addresses. No effect if it already has it.

    Raises:
        RuntimeError: the release made another layout or memory format than before; names the parameter.
    """
    for name, layer in mxfp4_layers(model).items():
        if layer._mxfp4_transformed:
            continue
        if _RECORD in layer.__dict__:
            _transform(name, layer)
        else:
            # The first transformation.
            layer.quant_method.process_weights_after_loading(layer)
            _record(name, layer)


def mxfp4_targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
    """Return, for each weight and scale of the MXFP4 layers, the tensor that loaders write and its kernel location.

    The layers must be in the checkpoint layout.
    """
    found = []
    for name, layer in mxfp4_layers(model).items():
        for key, pair in _record(name, layer).items():
            buffer, scale = pair.loaded_weight().data, pair.checkpoint_scale()
            found.append((buffer, Target.buffered(f"{name}.{key}", name, pair.kernel_weight, buffer)))
            steps = [(1, scale.numel(), 1)]
            found.append((scale, Target.kernel_layout(f"{name}.{key}{_SCALE}", name, pair.kernel_scale, steps)))
    return found


def refresh_mxfp4_after_delta(model: nn.Module, indices: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Bring the changed elements of MXFP4 layers into the kernel layout.

    Args:
        indices: by layer and parameter, int64 indices into the flattened parameter in checkpoint layout.

    Raises:
        RuntimeError: as `apply_mxfp4_transformation_after_loading`.
    """
    for name, layer in mxfp4_layers(model).items():
        changed = indices.get(name, {})
        if any(not key.endswith(_SCALE) for key in changed):
            _transform(name, layer)
        elif changed and hasattr(layer.quant_method, "refresh_after_loading"):
            layer.quant_method.refresh_after_loading(layer)


def _record(name: str, layer: MXFP4Layer) -> dict[str, _Pair]:
    """Return the record of a layer. Create it if missing, which requires the kernel layout."""
    record = layer.__dict__.get(_RECORD)
    if record is None:
        shapes = layer._mxfp4_original_shapes
        record = {key: _pair(name, layer, key) for key in shapes if not key.endswith(_SCALE)}
        # Bypasses nn.Module.__setattr__: a dictionary of parameters is bookkeeping, not a part of the model.
        layer.__dict__[_RECORD] = record
    return record


def _pair(name: str, layer: MXFP4Layer, key: str) -> _Pair:
    weight, scale = getattr(layer, key), getattr(layer, key + _SCALE)
    shape, scale_shape = layer._mxfp4_original_shapes[key], layer._mxfp4_original_shapes[key + _SCALE]
    *lead, n, half = shape
    expected = ((*lead, half, n), (*lead, scale_shape[-1] // 2, n, 2))
    found = tuple(weight.shape), tuple(scale.shape)
    if found != expected or not _is_view_of_loaded(scale.data):
        raise RuntimeError(
            f"{name}.{key}: the checkpoint shapes {list(shape)} and {list(scale_shape)} became {list(found[0])} and "
            f"{list(found[1])} with strides {scale.stride()} in kernel layout, expected {expected} and scales in the "
            "memory of the checkpoint layout: the layout of this release of vllm-ascend is not supported"
        )
    if weight.data.untyped_storage().nbytes() != weight.numel():
        raise RuntimeError(
            f"{name}.{key}: {n} outputs take {weight.data.untyped_storage().nbytes()} bytes for {weight.numel()}, so "
            "its memory is padded and cannot be copied: give the layer another value than W4A8_MXFP in "
            "actor_rollout_ref.rollout.quantization_config_file"
        )
    return _Pair(weight, scale, weight.data, scale.data, shape, memory_format(layer, weight.data))


def _restore(name: str, layer: MXFP4Layer) -> None:
    record = _record(name, layer)
    _check_unmoved(name, layer, record)
    for key, pair in record.items():
        layer._parameters[key] = pair.loaded_weight()
        pair.scale.data = pair.checkpoint_scale()
    layer._mxfp4_transformed = False


def _check_unmoved(name: str, layer: MXFP4Layer, record: Mapping[str, _Pair]) -> None:
    for key, pair in record.items():
        current = layer._parameters[key], layer._parameters[key + _SCALE]
        moved = current[0] is not pair.weight or current[1] is not pair.scale
        addresses = pair.weight.data_ptr(), pair.scale.data_ptr()
        if moved or addresses != (pair.kernel_weight.data_ptr(), pair.kernel_scale.data_ptr()):
            raise RuntimeError(
                f"{name}.{key}: its memory was replaced after the load; captured graphs would use the old memory"
            )


def _transform(name: str, layer: MXFP4Layer) -> None:
    """Transform a copy of the loaded weights, and copy the result into the memory of the first load."""
    record = _record(name, layer)
    for key, pair in record.items():
        on_device = pair.loaded_weight().data.to(pair.kernel_weight.device)
        layer._parameters[key] = nn.Parameter(on_device, requires_grad=False)
        pair.scale.data = pair.checkpoint_scale()
    layer._mxfp4_transformed = False
    try:
        (ascend_scheme(layer) or layer.quant_method).process_weights_after_loading(layer)
        made = {key: (layer._parameters[key], layer._parameters[key + _SCALE]) for key in record}
    finally:
        for key, pair in record.items():
            layer._parameters[key] = pair.weight
    for key, pair in record.items():
        weight, scale = (cast(nn.Parameter, parameter).data for parameter in made[key])
        _check_made(f"{name}.{key}", layer, pair, weight, scale)
        # Both are transposed views of whole tensors in one format, whose memory is copied as it is.
        pair.kernel_weight.transpose(-1, -2).copy_(weight.transpose(-1, -2))
        pair.scale.data = pair.kernel_scale


def _check_made(name: str, layer: MXFP4Layer, pair: _Pair, weight: torch.Tensor, scale: torch.Tensor) -> None:
    """Check that the release made the layout of the first load again."""
    found = memory_format(layer, weight)
    if found != pair.memory_format:
        raise RuntimeError(
            f"{name}: its memory format became {format_name(found)}, the first load made "
            f"{format_name(pair.memory_format)}: this release of vllm-ascend is not supported"
        )
    kernel = pair.kernel_weight
    layouts = (weight.shape, weight.stride(), scale.shape, scale.stride(), scale.data_ptr())
    first = (kernel.shape, kernel.stride(), pair.kernel_scale.shape, pair.kernel_scale.stride())
    if layouts != (*first, pair.kernel_scale.data_ptr()) or weight.storage_offset():
        raise RuntimeError(
            f"{name}: its layout became {layouts}, the first load made {first}: this release of vllm-ascend is not "
            "supported"
        )
