"""`rollout.quantization=fp8`: e4m3 in blocks of 128 x 128 with float32 scales, activations too, on CUDA and CPU."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

from verl.utils.quantization.ascend_layers import COLUMN, EMBEDDING, HEAD, NOT_MATRIX, ROW, VECTOR, Layer, read_layers
from verl.utils.quantization.formats import FP8_BLOCK_SIZE
from verl.utils.quantization.schemes.base import FIELD, ScaledFormat

_FIELD = f"{FIELD}=fp8"
# vLLM's fp8 method quantizes linear layers and never asks about these.
_NOT_LINEAR = (VECTOR, EMBEDDING, HEAD, NOT_MATRIX)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight [N, K]: [ceil(N / 128), ceil(K / 128)]."""
    return tuple(math.ceil(size / FP8_BLOCK_SIZE) for size in shape)


class Fp8Format(ScaledFormat):
    """The projections of the decoder are quantized, the same ones as by `ascend`."""

    name = "fp8"
    devices = ("cpu", "cuda")
    alternative = "ascend"

    @functools.cached_property
    def _by_parameter(self) -> dict[str, Layer]:
        index = self._read_index()
        if index.config.get("quantization_config") or index.text_config.get("quantization_config"):
            raise ValueError(
                f"{_FIELD}: the checkpoint {index.model_dir} is already quantized, and verl quantizes weights while it "
                "sends them; use the BF16 checkpoint"
            )
        return {layer.parameter: layer for layer in read_layers(index)}

    @property
    def layers(self) -> Collection[Layer]:
        return self._by_parameter.values()

    def validate_settings(self, device: str) -> None:
        file = self.settings.quantization_config_file
        if file is not None:
            raise NotImplementedError(f"{FIELD}_config_file={file}: not supported yet with quantization=fp8; use null")
        super().validate_settings(device)
        self._validate_bfloat16(device)

    def _validate_engine(self, device: str, installed: bool) -> None:
        if device == "cpu" and any(layer.experts for layer in self.layers):
            if self.settings.expert_parallel_size > 1:
                raise ValueError(
                    "actor_rollout_ref.rollout.expert_parallel_size="
                    f"{self.settings.expert_parallel_size}: vLLM's experts in fp8 on a CPU cannot be divided among "
                    f"ranks; use 1, or {FIELD}=ascend or null"
                )
            if installed:
                _validate_amx()
        super()._validate_engine(device, installed)
        for layer in self.layers:
            if layer.quantized:
                self._validate_blocks(layer)

    def _validate_blocks(self, layer: Layer) -> None:
        """Check that blocks end where vLLM cuts a layer, or where it packs one behind another."""
        whole = layer.experts and self.settings.expert_parallel_size > 1
        tp_size = 1 if whole else self.settings.tensor_model_parallel_size
        *_, n, k = layer.info.shape
        if layer.split == ROW and tp_size > 1 and k % (FP8_BLOCK_SIZE * tp_size):
            raise ValueError(
                f"{_FIELD}: {layer.name} {[n, k]} has {k} inputs, which blocks of {FP8_BLOCK_SIZE} do not divide among "
                f"tensor_model_parallel_size={tp_size}; use a smaller tensor_model_parallel_size"
            )
        if layer.split == COLUMN and (tp_size > 1 or layer.packed_with) and n % (FP8_BLOCK_SIZE * tp_size):
            raise ValueError(
                f"{_FIELD}: {layer.name} {[n, k]} has {n} outputs, which blocks of {FP8_BLOCK_SIZE} do not divide "
                f"(tensor_model_parallel_size={tp_size}); use quantization=null"
            )

    def _engine_arguments(self) -> dict[str, Any]:
        ignored = [layer.name for layer in self.layers if layer.reason and layer.reason not in _NOT_LINEAR]
        return {
            "quantization": "fp8",
            "hf_overrides": {
                "quantization_config": {
                    "quant_method": "fp8",
                    "fmt": "e4m3",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE],
                    "ignored_layers": ignored,
                }
            },
        }

    def summary(self) -> str:
        quantized = sum(layer.quantized for layer in self.layers)
        return f"float8 in blocks of {FP8_BLOCK_SIZE} x {FP8_BLOCK_SIZE}: {quantized} of {len(self.layers)} weights"

    def engine_bytes(self, itemsize: int) -> int:
        return sum(_nbytes(layer, itemsize) for layer in self.layers)

    def quantizes(self, name: str) -> bool:
        layer = self._by_parameter.get(name)
        return layer is not None and layer.quantized


def _nbytes(layer: Layer, itemsize: int) -> int:
    elements = math.prod(layer.info.shape)
    return elements + 4 * math.prod(scale_shape(layer.info.shape)) if layer.quantized else elements * itemsize


def _validate_amx() -> None:
    import torch

    if not torch.cpu._is_amx_tile_supported():
        raise ValueError(
            f"{_FIELD}: vLLM's experts in fp8 need a CPU with AMX, which this one lacks; use ascend or null"
        )
