"""Block-scaled fp8 kernel for any CPU: vLLM's own needs Intel's AMX, and a bias in float32, which no layer has.

Weights are dequantized once per update and kept in addition to the fp8 values. Activations are quantized in blocks of
1 x 128 at run time, like the GPU kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.platforms import current_platform

from verl.utils.quantization.fp8_block import fp8_block_dequantize, fp8_block_quantize
from verl.utils.vllm.layerwise import DEQUANTIZED_WEIGHT


class DequantizingFp8BlockKernel(Fp8BlockScaledMMLinearKernel):
    """Multiplies dequantized operands."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if current_platform.is_cpu() else (False, "runs on a CPU only")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        params = self._get_layer_params(layer)
        block = self.weight_group_shape
        # Bypasses nn.Module.__setattr__: this tensor is derived from the parameters and must not become one.
        layer.__dict__[DEQUANTIZED_WEIGHT] = fp8_block_dequantize(
            params.weight.data, params.block_scale.data, self.config.out_dtype, (block.row, block.col)
        )

    def apply_weights(
        self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        block = (1, self.weight_group_shape.col)
        rows = x.reshape(-1, x.shape[-1])
        rows = fp8_block_dequantize(*fp8_block_quantize(rows, block), x.dtype, block)
        return F.linear(rows, getattr(layer, DEQUANTIZED_WEIGHT), bias).view(*x.shape[:-1], -1)

    def apply_block_scaled_mm(self, A: torch.Tensor, B: torch.Tensor, As: torch.Tensor, Bs: torch.Tensor):
        raise NotImplementedError("apply_weights computes the full product")


def register() -> None:
    """Register the kernel once, before vLLM's own, so that every CPU computes the same."""
    from vllm.model_executor.kernels.linear import _POSSIBLE_FP8_BLOCK_KERNELS
    from vllm.platforms import PlatformEnum

    kernels = _POSSIBLE_FP8_BLOCK_KERNELS.setdefault(PlatformEnum.CPU, [])
    if DequantizingFp8BlockKernel not in kernels:
        kernels.insert(0, DequantizingFp8BlockKernel)
