"""`rollout.quantization=fp8`: e4m3 in blocks of 128 x 128 with float32 scales (`weight_scale_inv`)."""

from __future__ import annotations

import torch

from verl.utils.quantization.fp8_block import fp8_block_dequantize, fp8_block_quantize
from verl.utils.quantization.schemes.fp8 import scale_shape
from verl.workers.rollout.quantization.scaled import ScaledScheme, ScaledWeights


class Fp8Scheme(ScaledScheme):
    """A block holds 128 rows, so weights are encoded whole. vLLM's layer-wise reload loads them."""

    scaled = ScaledWeights("_scale_inv", "float32", scale_shape)

    def quantize(
        self, name: str, weight: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        weight = weight.to(dtype)
        values, scales = fp8_block_quantize(weight)
        weight = weight.float()
        error = fp8_block_dequantize(values, scales, torch.float32) - weight
        return values, scales, torch.stack([error.square().sum(), weight.square().sum()])

    @staticmethod
    def finite_scales(scales: torch.Tensor) -> bool:
        return bool(torch.isfinite(scales).all())
