"""`rollout.quantization=ascend`: MXFP8 and MXFP4, by vllm-ascend on an Ascend 950 and by its emulation on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.ascend_releases import installed_vllm_ascend
from verl.utils.quantization.formats import MX_BLOCK_SIZE, W4A8_MXFP
from verl.utils.quantization.mxfp4 import PACKED, mxfp4_dequantize, mxfp4_encode
from verl.utils.quantization.mxfp8 import (
    mxfp8_dequantize,
    mxfp8_encode,
    mxfp8_quantize,
    mxfp8_requantize,
    npu_mxfp8_quantize,
    squared_error,
)
from verl.utils.quantization.schemes.ascend import AscendFormat
from verl.utils.vllm.layout_map import Target
from verl.utils.vllm.vllm_fp8_utils import (
    apply_mxfp8_transformation_after_loading,
    check_kernel_layouts,
    kernel_layout_targets,
    mxfp8_layers,
    refresh_after_delta,
    restore_kernel_parameters,
    restore_mxfp8_weights_for_loading,
)
from verl.workers.rollout.quantization.mxfp4_layers import (
    apply_mxfp4_transformation_after_loading,
    check_mxfp4_kernel_layouts,
    mxfp4_layers,
    mxfp4_targets,
    refresh_mxfp4_after_delta,
    restore_mxfp4_weights_for_loading,
)
from verl.workers.rollout.quantization.mxfp4_self_test import run_mxfp4_self_test
from verl.workers.rollout.quantization.mxfp8_self_test import run_self_test
from verl.workers.rollout.quantization.scaled import ScaledScheme, ScaledWeights

_NAN_SCALE = 255
# The largest numbers of e4m3 and, two in a byte, of e2m1.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.uint8: 6.0}


class AscendScheme(ScaledScheme):
    """Scales are E8M0 bytes (uint8), one for 32 values along K, so encoding commutes with row slicing.

    Values are float8_e4m3fn [N, K] in MXFP8, and uint8 [N, K / 2] in MXFP4, which packs two of them in a byte.
    """

    format: AscendFormat
    scaled = ScaledWeights(
        "_scale",
        "uint8",
        lambda shape: (*shape[:-1], -(-shape[-1] // MX_BLOCK_SIZE)),
        {"float8_e4m3fn": 1, "uint8": PACKED},
    )

    def encodes_rows(self, name: str) -> bool:
        return name in self.format.description.parameters and self.quantizes(name)

    def _is_mxfp4(self, name: str) -> bool:
        layer = self.format.description.layer(name)
        return layer is not None and layer.scheme == W4A8_MXFP

    def quantize(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._is_mxfp4(name):
            return mxfp4_encode(weight, dtype)
        if weight.device.type != "npu":
            return mxfp8_encode(weight, dtype)
        rounded = weight.to(dtype)
        values, scales = npu_mxfp8_quantize(rounded)
        return values, scales, squared_error(rounded, values, scales)

    def quantized_names(self) -> list[str]:
        return [layer.parameter for layer in self.format.layers if layer.quantized]

    def decode_weight(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        values, scales = parts[""], parts[self.scaled.suffix]
        return (mxfp4_dequantize if values.dtype == torch.uint8 else mxfp8_dequantize)(values, scales, dtype)

    def round_activations(self, x: torch.Tensor) -> torch.Tensor:
        return mxfp8_dequantize(*_quantize_activations(x), x.dtype)

    def saturated(self, x: torch.Tensor, parts: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        values, scales = _quantize_activations(x) if parts is None else (parts[""], parts[self.scaled.suffix])
        largest = _LARGEST[values.dtype] * torch.exp2(scales.float() - 127)
        return x.abs() > largest.repeat_interleave(MX_BLOCK_SIZE, -1)[..., : x.shape[-1]]

    def requantize(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._is_mxfp4(name) or weight.device.type == "npu":
            return super().requantize(name, weight, dtype, values, scales)
        return mxfp8_requantize(weight, dtype, values, scales)

    @staticmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        return not scales.numel() or int(scales.max()) != _NAN_SCALE

    @staticmethod
    def check_engine(model: nn.Module) -> None:
        check_kernel_layouts(model)
        check_mxfp4_kernel_layouts(model)

    @staticmethod
    def self_test(model: nn.Module, vllm_config: Any) -> None:
        release = installed_vllm_ascend()
        maker = "verl's emulation on a CPU" if release is None else f"vllm-ascend {release}"
        run_self_test(model, vllm_config, maker)
        run_mxfp4_self_test(model, vllm_config, maker)

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        restore_mxfp8_weights_for_loading(model)
        restore_mxfp4_weights_for_loading(model)
        return {**mxfp8_layers(model), **mxfp4_layers(model)}

    @staticmethod
    def finish(model: nn.Module) -> None:
        apply_mxfp8_transformation_after_loading(model)
        apply_mxfp4_transformation_after_loading(model)

    @staticmethod
    def targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
        return kernel_layout_targets(model) + mxfp4_targets(model)

    @staticmethod
    def begin_delta(model: nn.Module) -> None:
        restore_kernel_parameters(model)

    @staticmethod
    def refresh(model: nn.Module, indices: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        refresh_after_delta(model, indices)
        refresh_mxfp4_after_delta(model, indices)


def _quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return npu_mxfp8_quantize(x) if x.device.type == "npu" else mxfp8_quantize(x)
