"""New weights for layers in MXFP8: back to the layout that weights are loaded in, and on to the run-time one.

The layers are vllm-ascend's, or those of `ascend_cpu`; both carry the same two marks, and nothing is ever decided by
the shape of a tensor:

- `layer._mxfp8_transformed`: whether it is in its run-time layout now;
- `layer._mxfp8_original_shapes`: the shape of each parameter as it is loaded.

| parameter | as loaded | as run |
|---|---|---|
| weight | [N, K] float8_e4m3fn | [K, N] |
| weight_scale | [N, ceil(K/32)] uint8 | [ceil(K/64), N, 2], an odd number of groups padded with a zero |
| w13_weight, w2_weight and their scales | the same with the number of experts in front | |

Between updates a layer runs on the very tensors it had after the first load, so their addresses never change and a
captured graph stays valid. A weight is loaded straight into that memory, through a transposed view; only scales, one
byte for 32 weights, take a detour where padding or order leave no view. Parameters stay the objects they were: vLLM
keeps their `weight_loader` on them.

vllm-ascend's own hooks, where a release has any (0.19.1rc1 and later), are used where they hold: linear layers with
buffers of their own (0.26) and an even number of groups. Earlier ones move the scales, odd numbers of groups raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.formats import ASCEND_METHOD, MXFP8_DESCRIPTION, W8A8_MXFP8
from verl.utils.vllm.layout_map import Target

MXFP8_BLOCK_QUANT_KWARGS: dict[str, Any] = dict(MXFP8_DESCRIPTION)
_SCALE = "_scale"
_RECORD = "_verl_mxfp8_record"
_ASCEND_CONFIGS = {("vllm_ascend", "AscendModelSlimConfig"), ("verl", "AscendCpuConfig")}
_ASCEND_SCHEMES = {"AscendW8A8MXFP8DynamicLinearMethod", "AscendW8A8MXFP8DynamicFusedMoEMethod"}


def is_mxfp8_vllm_ascend(quant_config: Any) -> bool:
    """Whether a vLLM quantization config is vllm-ascend's (or its CPU emulation's) and describes MXFP8 layers.

    Nothing is imported: a config of vllm-ascend's class can only exist where its module has been.
    """
    classes = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(quant_config).__mro__}
    if classes.isdisjoint(_ASCEND_CONFIGS):
        return False
    description = getattr(quant_config, "quant_description", None)
    if not isinstance(description, Mapping) or description.get("quant_method") != ASCEND_METHOD:
        return False
    return W8A8_MXFP8 in description.values()


@dataclass
class _Pair:
    """A weight with its scales: the parameters as vLLM knows them, and the tensors that the engine runs on."""

    weight: nn.Parameter
    scale: nn.Parameter
    run_weight: torch.Tensor
    run_scale: torch.Tensor
    groups: int

    def load_scale(self) -> torch.Tensor:
        """The scales as they are loaded: a copy, but for a single pair of groups, whose order is the same."""
        return scales_as_loaded(self.run_scale, self.groups)


def scales_as_loaded(run_scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Scales [ceil(groups / 2), N, 2] as [N, groups], experts in front; uint8."""
    if run_scale.device.type == "cpu" and run_scale.is_contiguous():
        # Pairs of bytes are moved as one, which halves the work of a transposing copy.
        pairs = run_scale.view(torch.int16).squeeze(-1).transpose(-1, -2).contiguous()
        return pairs.view(torch.uint8)[..., :groups]
    return run_scale.transpose(-2, -3).flatten(-2)[..., :groups]


def mxfp8_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights the two functions below take care of, by name.

    Raises:
        RuntimeError: a layer of vllm-ascend that carries no mark: its release has none (0.18.0) and the patch that adds
            them was not applied before the model was loaded.
    """
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "_mxfp8_transformed"):
            found[name] = layer
        elif type(_scheme(layer)).__name__ in _ASCEND_SCHEMES:
            raise RuntimeError(
                f"{name}: this release of vllm-ascend does not record how it laid the layer's weights out, and verl's "
                "plugin, which records it, was not loaded before the model: VLLM_PLUGINS must be unset or include verl"
            )
    return found


def restore_mxfp8_weights_for_loading(model: nn.Module) -> None:
    """Bring every MXFP8 layer into the layout that its weights are loaded in; nothing where it already is."""
    for name, layer in mxfp8_layers(model).items():
        if layer._mxfp8_transformed:
            _restore(name, layer)


def apply_mxfp8_transformation_after_loading(model: nn.Module) -> None:
    """Bring every MXFP8 layer into its run-time layout, at the addresses it had before; nothing where it already is."""
    for name, layer in mxfp8_layers(model).items():
        if not layer._mxfp8_transformed:
            _apply(name, layer)


def run_time_targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
    """For each weight and scale of the MXFP8 layers: what loaders write to, and where it is run from.

    Only while the layers are in their load layout.
    """
    found = []
    for name, layer in mxfp8_layers(model).items():
        for key, pair in _record(name, layer).items():
            shape = layer._mxfp8_original_shapes[key]
            strides = pair.run_weight.transpose(-1, -2).stride()
            steps = zip(_flat(shape), shape, strides, strict=True)
            found.append((pair.weight.data, Target.kernel_layout(f"{name}.{key}", name, pair.run_weight, steps)))
            *rows, groups = shape = layer._mxfp8_original_shapes[key + _SCALE]
            *lead, pairs, row, parity = pair.run_scale.stride()
            row_steps = zip(_flat(shape)[:-1], rows, (*lead, row), strict=True)
            steps = (*row_steps, (2, -(-groups // 2), pairs), (1, 2, parity))
            found.append((pair.scale.data, Target.kernel_layout(f"{name}.{key}{_SCALE}", name, pair.run_scale, steps)))
    return found


def run_time_layout_back(model: nn.Module) -> None:
    """Give MXFP8 layers the parameters that they run on, where waking up replaced them."""
    for name, layer in mxfp8_layers(model).items():
        if layer._mxfp8_transformed:
            _own_parameters_back(layer, _record(name, layer))


def refresh_patched(model: nn.Module, places: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Tell layers that keep something derived from their weights what was changed in place.

    Args:
        places: by layer and parameter, int64 places in the flattened parameter as it is loaded.
    """
    for name, changed in places.items():
        layer = model.get_submodule(name)
        refresh = getattr(getattr(layer, "quant_method", None), "refresh_after_patch", None)
        if refresh is not None:
            refresh(layer, changed)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def record_run_time_layout(layer: nn.Module, load_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Mark a layer that has just been brought into its run-time layout for the first time.

    Args:
        load_shapes: shapes of its weights and scales as they are loaded, by parameter name.
    """
    layer._mxfp8_original_shapes = {name: tuple(shape) for name, shape in load_shapes.items()}
    layer._mxfp8_transformed = True
    _record(type(layer).__name__, layer)


def _scheme(layer: nn.Module) -> Any:
    """What vllm-ascend hangs under a layer's quantization method."""
    return getattr(getattr(layer, "quant_method", None), "quant_method", None)


def _record(name: str, layer: nn.Module) -> dict[str, _Pair]:
    """The record of a layer, made where it has none: only while the layer is in its run-time layout."""
    record = layer.__dict__.get(_RECORD)
    if record is None:
        shapes = getattr(layer, "_mxfp8_original_shapes", None)
        if shapes is None:
            raise RuntimeError(f"{name}: marked as MXFP8, but the shapes of its weights were not recorded")
        record = {key: _pair(name, layer, key, shapes) for key in shapes if not key.endswith(_SCALE)}
        # Past nn.Module.__setattr__: a dictionary of parameters is bookkeeping, not a part of the model.
        layer.__dict__[_RECORD] = record
    return record


def _pair(name: str, layer: nn.Module, key: str, shapes: Mapping[str, tuple[int, ...]]) -> _Pair:
    weight, scale = getattr(layer, key), getattr(layer, key + _SCALE)
    *lead, n, k = shapes[key]
    groups = shapes[key + _SCALE][-1]
    pair = _Pair(weight, scale, weight.data, scale.data, groups)
    expected = ((*lead, k, n), (*lead, -(-groups // 2), n, 2))
    if (tuple(weight.shape), tuple(scale.shape)) != expected:
        raise RuntimeError(
            f"{name}.{key}: loaded as {list(shapes[key])} with scales {list(shapes[key + _SCALE])}, it runs as "
            f"{list(weight.shape)} and {list(scale.shape)}, where {expected} was expected: this release of vllm-ascend "
            "lays weights out in a way that is not known here"
        )
    return pair


def _release_restores(layer: nn.Module) -> bool:
    """Whether the release's own hooks leave a layer's addresses alone and its scales right."""
    scheme = _scheme(layer)
    own_buffers = hasattr(layer, "_mxfp8_weight_buf") and hasattr(layer, "_mxfp8_scale_buf")
    if not own_buffers or not hasattr(scheme, "restore_weights_for_rl_loading"):
        return False
    return all(shape[-1] % 2 == 0 for key, shape in layer._mxfp8_original_shapes.items() if key.endswith(_SCALE))


def _restore(name: str, layer: nn.Module) -> None:
    record = _record(name, layer)
    _own_parameters_back(layer, record)
    for key, pair in record.items():
        if (pair.weight.data_ptr(), pair.scale.data_ptr()) != (pair.run_weight.data_ptr(), pair.run_scale.data_ptr()):
            raise RuntimeError(f"{name}.{key}: its memory was replaced since it was loaded, which graphs do not notice")
    if _release_restores(layer):
        _scheme(layer).restore_weights_for_rl_loading(layer)
        return
    for pair in record.values():
        pair.weight.data = pair.run_weight.transpose(-1, -2)
        pair.scale.data = pair.load_scale()
    layer._mxfp8_transformed = False


def _own_parameters_back(layer: nn.Module, record: Mapping[str, _Pair]) -> None:
    """vllm-ascend 0.18.0 wakes experts up as new parameters, without loaders: the old ones still hold the memory."""
    for key, pair in record.items():
        for name, parameter in ((key, pair.weight), (key + _SCALE, pair.scale)):
            if layer._parameters[name] is not parameter:
                layer._parameters[name] = parameter


def _apply(name: str, layer: nn.Module) -> None:
    record = layer.__dict__.get(_RECORD)
    if record is None:
        # Its first weights: the release knows how.
        layer.quant_method.process_weights_after_loading(layer)
        _record(name, layer)
    elif _release_restores(layer):
        _scheme(layer).process_weights_after_loading(layer)
    else:
        for pair in record.values():
            loaded, run = pair.scale.data, pair.run_scale
            if loaded.untyped_storage().data_ptr() != run.untyped_storage().data_ptr():
                padded = nn.functional.pad(loaded, (0, 2 * run.shape[-3] - pair.groups))
                run.transpose(-2, -3).copy_(padded.unflatten(-1, (-1, 2)))
            pair.weight.data, pair.scale.data = pair.run_weight, run
        layer._mxfp8_transformed = True
    refresh = getattr(layer.quant_method, "refresh_after_loading", None)
    if refresh is not None:
        refresh(layer)
