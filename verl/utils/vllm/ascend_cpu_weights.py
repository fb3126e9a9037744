"""Weights of the layers that `ascend_cpu` emulates: parameters, layouts, and the dequantized copies for products.

Parameters and layouts are those of vllm-ascend; the hooks of `vllm_fp8_utils` and of
verl.workers.rollout.quantization.mxfp4_layers reload them. There is no FRACTAL_NZ on a CPU: an MXFP4 weight in the
kernel layout is a transposed view of new memory.

Memory: each weight is kept twice, quantized (MXFP8 1 1/32 bytes per weight, MXFP4 17/32 bytes and as much again for the
buffer of updates) and dequantized (2 or 4 bytes), once per update. Dequantizing in every step would cost many
times the product of a small batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.utils import set_weight_attrs

from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.quantization.mxfp4 import PACKED, mxfp4_dequantize
from verl.utils.quantization.mxfp8 import mxfp8_dequantize
from verl.utils.vllm.vllm_fp8_utils import record_kernel_layout, scales_in_checkpoint_layout


def _groups(k: int) -> int:
    return -(-k // MX_BLOCK_SIZE)


def _parameter(layer: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, **attributes: Any) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
    layer.register_parameter(name, parameter)
    set_weight_attrs(parameter, attributes)


class EmulatedWeights(ABC):
    """Creates the weights of a layer, and keeps their dequantized copies up to date.

    Layers are `Any`: the methods set and read attributes that no class declares.

    Attributes:
        keys: names of the weights; their scales have the suffix `_scale`.
        multiple: the numbers of inputs of which a rank can have a share.
    """

    keys: tuple[str, ...]
    multiple: int = MX_BLOCK_SIZE

    @abstractmethod
    def _create_values(self, layer: Any, key: str, rows: tuple[int, ...], k: int, **attributes: Any) -> None:
        """Create the values [*rows, K] of a weight in the checkpoint layout."""

    @abstractmethod
    def _to_kernel_layout(self, layer: Any) -> None:
        """Transform all weights and mark the layer. No effect in the kernel layout."""

    @abstractmethod
    def _checkpoint_shapes(self, layer: Any) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of weights and scales in the checkpoint layout, by parameter name."""

    @abstractmethod
    def _dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Dequantize contiguous values and scales in the checkpoint layout."""

    def create_weight(
        self,
        layer: Any,
        key: str,
        rows: tuple[int, ...],
        k: int,
        attributes: Mapping[str, Any],
        scale_attributes: Mapping[str, Any],
    ) -> None:
        """Create a weight of shape [*rows, K] and its scales uint8 [*rows, ceil(K / 32)], in the checkpoint layout.

        Args:
            attributes, scale_attributes: attributes of the two parameters, for vLLM's loaders.
        """
        self._create_values(layer, key, rows, k, **attributes)
        _parameter(layer, f"{key}_scale", (*rows, _groups(k)), torch.uint8, **scale_attributes)

    def process_weights_after_loading(self, layer: Any) -> None:
        self._to_kernel_layout(layer)
        self.refresh_after_loading(layer)

    def refresh_after_loading(self, layer: Any) -> None:
        """Dequantize all weights of a layer in the kernel layout."""
        for key in self.keys:
            self._refresh(layer, key)

    def _refresh(self, layer: Any, key: str) -> None:
        name = f"_dequantized_{key}"
        values = getattr(layer, key).data.transpose(-1, -2).contiguous()
        shape = self._checkpoint_shapes(layer)[f"{key}_scale"]
        scales = scales_in_checkpoint_layout(getattr(layer, f"{key}_scale").data, shape[-1]).contiguous()
        made = self._dequantize(values, scales, layer._mx_compute_dtype, layer.__dict__.get(name))
        # Bypasses nn.Module.__setattr__: this tensor is derived from the parameters and must not become one.
        layer.__dict__[name] = made


class Mxfp8Weights(EmulatedWeights):
    """Values float8_e4m3fn [N, K]."""

    def _create_values(self, layer: Any, key: str, rows: tuple[int, ...], k: int, **attributes: Any) -> None:
        _parameter(layer, key, (*rows, k), torch.float8_e4m3fn, **attributes)

    def _to_kernel_layout(self, layer: Any) -> None:
        if getattr(layer, "_mxfp8_transformed", False):
            return
        shapes: dict[str, tuple[int, ...]] = {}
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            shapes |= {key: tuple(weight.shape), f"{key}_scale": tuple(scale.shape)}
            padded = F.pad(scale.data, (0, scale.shape[-1] % 2))
            scale.data = padded.unflatten(-1, (-1, 2)).transpose(-2, -3).contiguous()
            # A view: new weights are loaded and dequantized row by row in the underlying memory.
            weight.data = weight.data.transpose(-1, -2)
        record_kernel_layout(layer, shapes)

    def _checkpoint_shapes(self, layer: Any) -> Mapping[str, tuple[int, ...]]:
        return layer._mxfp8_original_shapes

    def _dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
    ) -> torch.Tensor:
        return mxfp8_dequantize(values, scales, dtype, out=out)

    def refresh_after_delta(self, layer: Any, indices: Mapping[str, torch.Tensor]) -> None:
        """Dequantize the blocks with changed elements.

        Args:
            indices: by parameter, int64 indices into the flattened parameter in checkpoint layout.
        """
        for key in self.keys:
            shape = layer._mxfp8_original_shapes[key]
            k, groups = shape[-1], _groups(shape[-1])
            blocks = [indices[f"{key}_scale"]] if f"{key}_scale" in indices else []
            if key in indices:
                row = torch.div(indices[key], k, rounding_mode="floor")
                blocks.append(row * groups + torch.div(indices[key] - row * k, MX_BLOCK_SIZE, rounding_mode="floor"))
            if not blocks:
                continue
            changed = torch.cat(blocks).unique()
            made = layer.__dict__[f"_dequantized_{key}"]
            if k % MX_BLOCK_SIZE or len(changed) > made.numel() // MX_BLOCK_SIZE // 2:
                self._refresh(layer, key)
                continue
            weight, scale = getattr(layer, key).data, getattr(layer, f"{key}_scale").data
            values = weight.transpose(-1, -2).contiguous().view(torch.uint8).view(-1, MX_BLOCK_SIZE)[changed]
            scales = scales_in_checkpoint_layout(scale, groups).flatten()[changed]
            fresh = mxfp8_dequantize(values.view(torch.float8_e4m3fn), scales[:, None], made.dtype)
            made.view(-1, MX_BLOCK_SIZE)[changed] = fresh


class Mxfp4Weights(EmulatedWeights):
    """Values uint8 [N, K / 2], two in a byte."""

    multiple = 2 * MX_BLOCK_SIZE

    def _create_values(self, layer: Any, key: str, rows: tuple[int, ...], k: int, **attributes: Any) -> None:
        if k % self.multiple:
            raise ValueError(f"quantization=ascend: {key} has {k} inputs, W4A8_MXFP takes multiples of {self.multiple}")
        _parameter(layer, key, (*rows, k // PACKED), torch.uint8, **attributes)

    def _to_kernel_layout(self, layer: Any) -> None:
        if getattr(layer, "_mxfp4_transformed", False):
            return
        names = [name for key in self.keys for name in (key, f"{key}_scale")]
        layer._mxfp4_original_shapes = {name: tuple(getattr(layer, name).shape) for name in names}
        for key in self.keys:
            weight, scale = getattr(layer, key), getattr(layer, f"{key}_scale")
            # As on an NPU: new memory for the weight, a view of the loaded memory for the scales.
            weight.data = weight.data.clone().transpose(-1, -2)
            scale.data = scale.data.unflatten(-1, (-1, 2)).transpose(-2, -3)
        layer._mxfp4_transformed = True

    def _checkpoint_shapes(self, layer: Any) -> Mapping[str, tuple[int, ...]]:
        return layer._mxfp4_original_shapes

    def _dequantize(
        self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
    ) -> torch.Tensor:
        return mxfp4_dequantize(values, scales, dtype, out=out)
