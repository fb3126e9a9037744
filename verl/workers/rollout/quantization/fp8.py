"""`rollout.quantization=fp8`: e4m3 in blocks of 128 x 128 with float32 scales (`weight_scale_inv`), activations too."""

from __future__ import annotations

import functools
from typing import Any

import torch

from verl.utils.quantization.fp8_block import BLOCK, fp8_block_dequantize, fp8_block_quantize
from verl.utils.vllm.ascend_layers import COLUMN, EMBEDDING, HEAD, NOT_MATRIX, ROW, VECTOR, Layer, read_layers
from verl.utils.vllm.checkpoint_index import read_checkpoint_index
from verl.workers.rollout.quantization.scaled import ScaledScheme, ScaledWeights, refuse_fused_experts

_SETTING = "actor_rollout_ref.rollout.quantization=fp8"
# What vLLM's fp8 method never sees: it quantises linear layers.
_NO_LINEAR = (VECTOR, EMBEDDING, HEAD, NOT_MATRIX)


class Fp8Scheme(ScaledScheme):
    """The projections of the decoder are quantised, the same ones as by `ascend`; the engine reloads them by layers.

    A block holds 128 rows, so that weights are encoded whole.
    """

    scaled = ScaledWeights("_scale_inv", "float32", lambda shape: tuple(-(-size // BLOCK) for size in shape))

    @functools.cached_property
    def _layers(self) -> dict[str, Layer]:
        index = read_checkpoint_index(self._model_dir)
        if index.config.get("quantization_config") or index.text_config.get("quantization_config"):
            raise ValueError(
                f"{_SETTING}: the checkpoint {self._model_dir} is already quantised: weights are quantised while they "
                "are sent; use the BF16 checkpoint"
            )
        return {layer.parameter: layer for layer in read_layers(index)}

    def engine_overrides(self, device: str) -> dict[str, Any]:
        if self._rollout.quantization_config_file is not None:
            raise NotImplementedError(
                f"actor_rollout_ref.rollout.quantization_config_file={self._rollout.quantization_config_file} is not "
                "supported yet with quantization=fp8: use null"
            )
        if device == "npu":
            raise ValueError(f"{_SETTING}: not on an Ascend NPU; use ascend there")
        self._refuse_load_format()
        self._refuse_dtype(device)
        layers = self._layers.values()
        if device == "cpu" and any(layer.experts for layer in layers) and not torch.cpu._is_amx_tile_supported():
            raise ValueError(
                f"{_SETTING}: vLLM's experts in fp8 need a CPU with AMX, which this one lacks; use ascend or null"
            )
        refuse_fused_experts(layers)
        for layer in layers:
            _refuse_uncuttable(layer, self._rollout.tensor_model_parallel_size)
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
        quantised = [layer for layer in self._layers.values() if layer.quantised]
        return f"float8 in blocks of {BLOCK} x {BLOCK}: {len(quantised)} of {len(self._layers)} weights"

    def quantises(self, name: str) -> bool:
        layer = self._layers.get(name)
        return layer is not None and layer.quantised

    def quantise(self, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = weight.to(dtype)
        values, scales = fp8_block_quantize(weight)
        weight = weight.float()
        error = fp8_block_dequantize(values, scales, torch.float32) - weight
        return values, scales, torch.stack([error.square().sum(), weight.square().sum()])

    @staticmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        return bool(torch.isfinite(scales).all())


def _refuse_uncuttable(layer: Layer, tp_size: int) -> None:
    """Blocks must end where vLLM cuts a layer, or where it packs one after another."""
    if not layer.quantised:
        return
    *_, n, k = layer.info.shape
    if layer.split == ROW and tp_size > 1 and k % (BLOCK * tp_size):
        raise ValueError(
            f"{_SETTING}: {layer.name} {[n, k]} has {k} inputs, which blocks of {BLOCK} do not divide among "
            f"tensor_model_parallel_size={tp_size}"
        )
    if layer.split == COLUMN and (tp_size > 1 or layer.packed_with) and n % (BLOCK * tp_size):
        raise ValueError(
            f"{_SETTING}: {layer.name} {[n, k]} has {n} outputs, which blocks of {BLOCK} do not divide "
            f"(tensor_model_parallel_size={tp_size}); use quantization=null"
        )
