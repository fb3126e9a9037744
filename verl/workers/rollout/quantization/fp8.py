"""`rollout.quantization=fp8`: e4m3 in blocks of 128 x 128 with float32 scales (`weight_scale_inv`), activations too."""

from __future__ import annotations

import functools
from typing import Any

import torch

from verl.utils.model_dir.index import read_checkpoint_index
from verl.utils.quantization.ascend_layers import EMBEDDING, HEAD, NOT_MATRIX, VECTOR, Layer
from verl.utils.quantization.fp8_block import BLOCK, fp8_block_dequantize, fp8_block_quantize
from verl.utils.quantization.requirements import (
    fp8_layers,
    fp8_summary,
    validate_config_file,
    validate_device,
    validate_dtype,
    validate_fused_experts,
    validate_load_format,
    validate_uncuttable_fp8,
)
from verl.workers.rollout.quantization.scaled import ScaledScheme, ScaledWeights

_SETTING = "actor_rollout_ref.rollout.quantization=fp8"
# What vLLM's fp8 method never sees: it quantizes linear layers.
_NO_LINEAR = (VECTOR, EMBEDDING, HEAD, NOT_MATRIX)


class Fp8Scheme(ScaledScheme):
    """The projections of the decoder are quantized, the same ones as by `ascend`; the engine reloads them by layers.

    A block holds 128 rows, so that weights are encoded whole.
    """

    scaled = ScaledWeights("_scale_inv", "float32", lambda shape: tuple(-(-size // BLOCK) for size in shape))

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        return fp8_layers(read_checkpoint_index(self._model_dir))

    def engine_overrides(self, device: str) -> dict[str, Any]:
        validate_config_file("fp8", self._rollout.quantization_config_file)
        validate_device("fp8", device)
        validate_load_format("fp8", self._rollout.load_format)
        validate_dtype("fp8", self._rollout.dtype, device)
        layers = self._layers.values()
        if device == "cpu" and any(layer.experts for layer in layers) and not torch.cpu._is_amx_tile_supported():
            raise ValueError(
                f"{_SETTING}: vLLM's experts in fp8 need a CPU with AMX, which this one lacks; use ascend or null"
            )
        validate_fused_experts(layers)
        for layer in layers:
            validate_uncuttable_fp8(layer, self._rollout.tensor_model_parallel_size)
        return {
            "quantization": "fp8",
            "hf_overrides": {
                "quantization_config": {
                    "quant_method": "fp8",
                    "fmt": "e4m3",
                    "activation_scheme": "dynamic",
                    "weight_block_size": [BLOCK, BLOCK],
                    "ignored_layers": [
                        layer.name for layer in layers if layer.reason and layer.reason not in _NO_LINEAR
                    ],
                }
            },
        }

    def summary(self) -> str:
        return fp8_summary(self._layers.values())

    def quantizes(self, name: str) -> bool:
        layer = self._layers.get(name)
        return layer is not None and layer.quantized

    def quantize(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = weight.to(dtype)
        values, scales = fp8_block_quantize(weight)
        weight = weight.float()
        error = fp8_block_dequantize(values, scales, torch.float32) - weight
        return values, scales, torch.stack([error.square().sum(), weight.square().sum()])

    @staticmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        return bool(torch.isfinite(scales).all())
