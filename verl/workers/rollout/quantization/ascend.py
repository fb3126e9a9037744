"""`rollout.quantization=ascend`: MXFP8, by vllm-ascend on an Ascend 950 and by its emulation on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.ascend_description import AscendDescription, resolve_description
from verl.utils.quantization.ascend_releases import validate_unpaired_groups
from verl.utils.quantization.mx import (
    MX_BLOCK_SIZE,
    mxfp8_encode,
    mxfp8_requantize,
    npu_mxfp8_quantize,
    squared_error,
)
from verl.utils.quantization.requirements import (
    validate_device,
    validate_dtype,
    validate_fused_experts,
    validate_load_format,
)
from verl.utils.vllm.layout_map import Target
from verl.utils.vllm.npu_settings import check_vllm_ascend
from verl.utils.vllm.vllm_fp8_utils import (
    MXFP8_BLOCK_QUANT_KWARGS,
    apply_mxfp8_transformation_after_loading,
    mxfp8_layers,
    refresh_patched,
    restore_mxfp8_weights_for_loading,
    run_time_layout_back,
    run_time_targets,
)
from verl.workers.rollout.quantization.scaled import ScaledScheme, ScaledWeights

_NAN_SCALE = 255


class AscendScheme(ScaledScheme):
    """Scales are E8M0 bytes (uint8), one for 32 values along K, so that every row of a weight stands for itself."""

    scaled = ScaledWeights("_scale", "uint8", lambda shape: (*shape[:-1], -(-shape[-1] // MX_BLOCK_SIZE)))

    @functools.cached_property
    def description(self) -> AscendDescription:
        """Which weights are quantized."""
        return resolve_description(
            self._model_dir, self._rollout.quantization_config_file, self._rollout.tensor_model_parallel_size
        )

    def engine_overrides(self, device: str) -> dict[str, Any]:
        validate_device("ascend", device)
        validate_load_format("ascend", self._rollout.load_format)
        if device == "npu":
            release = check_vllm_ascend()
            validate_dtype("ascend", self._rollout.dtype, device)
            validate_unpaired_groups(self.description.layers, self._rollout.tensor_model_parallel_size, release)
        validate_fused_experts(self.description.layers)
        described = {**MXFP8_BLOCK_QUANT_KWARGS, **self.description.to_json_dict()}
        return {"quantization": "ascend", "hf_overrides": {"quantization_config": described}}

    def summary(self) -> str:
        return f"MXFP8: {self.description.summary()}"

    def update_bytes(self, itemsize: int) -> int | None:
        if self._rollout.quantization_side == "receiver":
            return None
        return self.description.sent_bytes(itemsize)

    def quantizes(self, name: str) -> bool:
        return self.description.is_quantized(name)

    def encodes_rows(self, name: str) -> bool:
        return name in self.description.parameters and self.description.is_quantized(name)

    def quantize(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if weight.device.type != "npu":
            return mxfp8_encode(weight, dtype)
        rounded = weight.to(dtype)
        values, scales = npu_mxfp8_quantize(rounded)
        return values, scales, squared_error(rounded, values, scales)

    def requantize(
        self, weight: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, scales: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if weight.device.type == "npu":
            return super().requantize(weight, dtype, values, scales)
        return mxfp8_requantize(weight, dtype, values, scales)

    @staticmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        return not scales.numel() or int(scales.max()) != _NAN_SCALE

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        restore_mxfp8_weights_for_loading(model)
        return mxfp8_layers(model)

    @staticmethod
    def finish(model: nn.Module) -> None:
        apply_mxfp8_transformation_after_loading(model)

    @staticmethod
    def targets(model: nn.Module) -> list[tuple[torch.Tensor, Target]]:
        return run_time_targets(model)

    @staticmethod
    def begin_delta(model: nn.Module) -> None:
        run_time_layout_back(model)

    @staticmethod
    def refresh(model: nn.Module, places: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        refresh_patched(model, places)
