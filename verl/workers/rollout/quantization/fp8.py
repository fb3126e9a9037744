"""`rollout.quantization=fp8`: e4m3 in blocks of 128 x 128 with float32 scales (`weight_scale_inv`), activations too."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from verl.utils.quantization.fp8_block import BLOCK, fp8_block_quantize
from verl.utils.vllm.ascend_layers import COLUMN, EMBEDDING, HEAD, NOT_MATRIX, ROW, VECTOR, Layer, read_layers
from verl.utils.vllm.checkpoint_index import read_checkpoint_index
from verl.workers.rollout.quantization.base import QuantizationScheme
from verl.workers.rollout.quantization.scaled import ScaledWeights, refuse_fused_experts, refuse_non_finite
from verl.workers.rollout.weight_sync.manifest import TensorSpec, WeightUpdateError

_SETTING = "actor_rollout_ref.rollout.quantization=fp8"
_SCALED = ScaledWeights("_scale_inv", "float32", lambda shape: tuple(-(-size // BLOCK) for size in shape))
# What vLLM's fp8 method never sees: it quantises linear layers.
_NO_LINEAR = (VECTOR, EMBEDDING, HEAD, NOT_MATRIX)


class Fp8Scheme(QuantizationScheme):
    """Weights travel as `(name, float8_e4m3fn)` and `(name + "_scale_inv", float32)`.

    The projections of the decoder are quantised, the same ones as by `ascend`; the engine reloads them layer by layer.
    """

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

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            layer = self._layers.get(name)
            if layer is None or not layer.quantised:
                refuse_non_finite(name, tensor)
                yield name, tensor
                continue
            values, scales = fp8_block_quantize(tensor)
            refuse_non_finite(name, scales)
            yield name, values
            yield f"{name}_scale_inv", scales

    @staticmethod
    def check_arriving(name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        _SCALED.check_pair(name, arrived)
        if _SCALED.weight_of(name) is not None and not bool(torch.isfinite(tensor).all()):
            raise WeightUpdateError(f"parameter {name!r} holds a scale that is NaN or Inf: its weight is not finite")

    @staticmethod
    def check_complete(arrived: Mapping[str, TensorSpec]) -> None:
        _SCALED.check_complete(arrived)


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
