"""`rollout.quantization=ascend`: MXFP8, by vllm-ascend on an Ascend 950 and by its emulation on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from verl.utils.quantization.mx import MX_BLOCK_SIZE, mxfp8_quantize, npu_mxfp8_quantize
from verl.utils.vllm.ascend_description import AscendDescription, resolve_description
from verl.utils.vllm.npu_vllm_patch import check_vllm_ascend
from verl.utils.vllm.vllm_fp8_utils import (
    MXFP8_BLOCK_QUANT_KWARGS,
    apply_mxfp8_transformation_after_loading,
    mxfp8_layers,
    restore_mxfp8_weights_for_loading,
)
from verl.workers.rollout.quantization.base import QuantizationScheme
from verl.workers.rollout.quantization.scaled import ScaledWeights, refuse_fused_experts, refuse_non_finite
from verl.workers.rollout.weight_sync.manifest import TensorSpec, WeightUpdateError

_NAN_SCALE = 255
_SCALED = ScaledWeights("_scale", "uint8", lambda shape: (*shape[:-1], -(-shape[-1] // MX_BLOCK_SIZE)))


class AscendScheme(QuantizationScheme):
    """Weights travel as `(name, float8_e4m3fn)` and `(name + "_scale", uint8)`: E8M0 bytes, one for 32 along K."""

    @functools.cached_property
    def description(self) -> AscendDescription:
        """Which weights are quantised."""
        return resolve_description(
            self._model_dir, self._rollout.quantization_config_file, self._rollout.tensor_model_parallel_size
        )

    def engine_overrides(self, device: str) -> dict[str, Any]:
        if device not in ("cpu", "npu"):
            raise ValueError(
                f"actor_rollout_ref.rollout.quantization=ascend: runs on an Ascend NPU and, emulated, on a CPU, not on "
                f"{device}; use fp8 there"
            )
        if device == "npu":
            check_vllm_ascend()
        refuse_fused_experts(self.description.layers)
        described = {**MXFP8_BLOCK_QUANT_KWARGS, **self.description.to_json_dict()}
        return {"quantization": "ascend", "hf_overrides": {"quantization_config": described}}

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            if not self.description.is_quantised(name):
                refuse_non_finite(name, tensor)
                yield name, tensor
                continue
            values, scales = (npu_mxfp8_quantize if tensor.device.type == "npu" else mxfp8_quantize)(tensor)
            if bool((scales == _NAN_SCALE).any()):
                refuse_non_finite(name, tensor)
            yield name, values
            yield f"{name}_scale", scales

    @staticmethod
    def begin(model: nn.Module) -> Mapping[str, nn.Module]:
        restore_mxfp8_weights_for_loading(model)
        return mxfp8_layers(model)

    @staticmethod
    def finish(model: nn.Module) -> None:
        apply_mxfp8_transformation_after_loading(model)

    @staticmethod
    def check_arriving(name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        _SCALED.check_pair(name, arrived)
        if _SCALED.weight_of(name) is not None and bool((tensor == _NAN_SCALE).any()):
            raise WeightUpdateError(
                f"parameter {name!r} holds a NaN scale (byte {_NAN_SCALE}): its weight is not finite"
            )

    @staticmethod
    def check_complete(arrived: Mapping[str, TensorSpec]) -> None:
        _SCALED.check_complete(arrived)
