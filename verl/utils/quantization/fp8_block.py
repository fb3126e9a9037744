"""Float8 e4m3 in blocks with one float32 scale each, the format of DeepSeek-V3 checkpoints.

Weights have blocks of 128 x 128, activations of 1 x 128: sections 3.3.2 and 3.5.2 of "DeepSeek-V3 Technical Report"
(arXiv:2412.19437).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from verl.utils.quantization.formats import FP8_BLOCK_SIZE

_E4M3_MAX = 448.0


def fp8_block_quantize(
    x: torch.Tensor, block: tuple[int, int] = (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix so that the largest magnitude of each block becomes 448.

    Args:
        x: floating, [N, K]; the last blocks of rows and columns may be smaller.
        block: rows and columns of a block.

    Returns:
        values float8_e4m3fn [N, K], rounded to nearest even, and the scales to multiply them with, float32
        [ceil(N / rows), ceil(K / columns)]: 1 for a block of zeros, NaN or Inf for a block that is not finite.

    Raises:
        ValueError: x is not a matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a matrix for blocks of {block}")
    tiles = _tiles(x.detach().float(), block)
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / _E4M3_MAX)
    values = (tiles / scales).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return _untiled(values, x.shape), scales[:, 0, :, 0].contiguous()


def fp8_block_dequantize(
    values: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    block: tuple[int, int] = (FP8_BLOCK_SIZE, FP8_BLOCK_SIZE),
) -> torch.Tensor:
    """Multiply values [N, K] by the scales of their blocks [ceil(N / rows), ceil(K / columns)], in float32.

    Returns:
        [N, K] of `dtype`.
    """
    tiles = _tiles(values.float(), block) * scales[:, None, :, None]
    return _untiled(tiles, values.shape).to(dtype)


def _tiles(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    (n, k), (rows, columns) = x.shape, block
    padded = F.pad(x, (0, -k % columns, 0, -n % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()
