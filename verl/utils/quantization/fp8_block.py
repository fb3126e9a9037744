"""Float8 e4m3 in blocks with a float32 scale each, as checkpoints of DeepSeek-V3's kind hold them.

Weights have blocks of 128 x 128, activations of 1 x 128: sections 3.3.2 and 3.5.2 of "DeepSeek-V3 Technical Report"
(arXiv:2412.19437).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 128
_E4M3_MAX = 448.0


def fp8_block_quantize(x: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes a matrix so that each block's largest magnitude becomes 448.

    Args:
        x: floating, [N, K]; blocks at the ends may be smaller than the rest.
        block: rows and columns of a block.

    Returns:
        values float8_e4m3fn [N, K], rounded to nearest even, and the scales to multiply them with, float32
        [ceil(N / rows), ceil(K / columns)]: 1 for a block of zeros, NaN or Inf where a block is not finite.

    Raises:
        ValueError: x is not a matrix.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}: blocks of {block} need a matrix")
    tiles = _tiles(x.detach().float(), block)
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / _E4M3_MAX)
    values = (tiles / scales).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return _untiled(values, x.shape), scales[:, 0, :, 0].contiguous()


def fp8_block_dequantize(
    values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (BLOCK, BLOCK)
) -> torch.Tensor:
    """values [N, K] times their blocks' scales [ceil(N / rows), ceil(K / columns)], computed in float32, in `dtype`."""
    tiles = _tiles(values.float(), block) * scales[:, None, :, None]
    return _untiled(tiles, values.shape).to(dtype)


def _tiles(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    (n, k), (rows, columns) = x.shape, block
    padded = F.pad(x, (0, -k % columns, 0, -n % rows))
    return padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _untiled(tiles: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()
