"""MXFP4 numerics: blocks of 32 float4 e2m1 values along the last dimension that share one power-of-two scale (E8M0).

The format is MXFP4 of the "OCP Microscaling Formats (MX) Specification", version 1.0 (OCP MX below), section 5.2. The
e2m1 element (5.3.3) has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6, and neither Inf nor NaN; conversion is in 6.3.

Two values share a byte, the first one in the low four bits: the order of `torch.float4_e2m1fn_x2`, and of the function
with which vllm-ascend 0.30 unpacks MXFP4 weights (`w4a16_mxfp4.py`).

The torch operators give the same bits on every device. On a GPU `torch.compile` fuses them; on a CPU they run in
pieces.

Known difference to Ascend's `npu_dynamic_mx_quant` (by its published source, not compared on hardware): it writes zeros
in a block whose scale byte is 0, that is, if every magnitude is below 2^-124. Here these values are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.quantization.mx_blocks import (
    EAGER_PIECE,
    FLOAT32_INF_BITS,
    SOURCE_DTYPES,
    as_scale_bytes,
    ceil_div,
    check_out,
    check_source,
    from_blocks,
    fused,
    npu_operator,
    to_blocks,
    trim_scales,
)

# Values in a byte.
PACKED = 2
_PACKED_BLOCK = MX_BLOCK_SIZE // PACKED


def mxfp4_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP4 along the last dimension, by OCP MX section 6.3.

    With amax as the largest magnitude of a block, its scale is 2^(byte - 127) with
    byte = floor(log2(amax)) - 2 + 127, clamped to 0..254, where 2 is e2m1's largest exponent. This is also the rule of
    `npu_dynamic_mx_quant` with scale_alg 0. Values are x / scale rounded to the nearest e2m1 number, ties to even,
    saturated to +-6, signed zeros kept. A block of zeros has byte 0. A block that holds NaN or Inf gets byte 255, which
    makes all its values NaN (OCP MX 5.1); their codes are 0. A partial last block is quantized on its own, as if padded
    with zeros.

    Args:
        x: float32, bfloat16 or float16, shape [..., K], K even, any strides; not a DTensor. Gradients do not flow.

    Returns:
        packed values uint8 [..., K / 2] and scales uint8 [..., ceil(K / 32)] (E8M0 bytes), contiguous, on x's device.

    Raises:
        TypeError: x is not a plain tensor of one of these dtypes.
        ValueError: x has no dimension, or K is odd.
    """
    _check_even(x)
    parts = _fused_or_in_pieces(_quantize_blocks, to_blocks(x.detach(), MX_BLOCK_SIZE))
    return _as_rows(parts, x)


def mxfp4_dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute e2m1 values * 2^(scale byte - 127), block by block (OCP MX sections 5.1 and 5.4.1).

    Args:
        packed: uint8 [..., K / 2].
        scales: uint8 or float8_e8m0fnu [..., ceil(K / 32)].
        dtype: float32, bfloat16 or float16. The product is exact in float32, except for Inf beyond its range (bytes 253
            and 254), and is then rounded to nearest even.
        out: contiguous [..., K] of `dtype` to write into instead of a new tensor.

    Returns:
        [..., K] of `dtype`; NaN for every value of a block whose byte is 255.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; the message names both.
    """
    if dtype not in SOURCE_DTYPES:
        raise TypeError(f"dtype={dtype}: must be float32, bfloat16 or float16")
    scales = _check_pair(packed, scales)
    shape = torch.Size((*packed.shape[:-1], PACKED * packed.shape[-1]))
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    else:
        check_out(out, "out", shape, dtype, packed.device)
    if not packed.numel():
        return out
    blocks = to_blocks(packed, _PACKED_BLOCK)
    (decoded,) = _fused_or_in_pieces(_dequantize_blocks, blocks, scales.reshape(-1, 1))
    return out.copy_(from_blocks(decoded, shape, MX_BLOCK_SIZE))


def mxfp4_squared_error(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return [sum of squared errors, sum of squares of x]. They add up over parts of a tensor.

    Args:
        x: [..., K], the source of the other two.
        packed, scales: as of `mxfp4_dequantize`.

    Returns:
        [2] on x's device, float64 (float32 on an NPU), NaN if x or scales hold NaN or Inf; does not synchronize with
        the device.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; the message names both.
    """
    _check_even(x)
    scales = _check_pair(packed, scales)
    if x.shape != (*packed.shape[:-1], PACKED * packed.shape[-1]):
        raise ValueError(f"x has shape {tuple(x.shape)}, packed values {tuple(packed.shape)}: must be half as long")
    # An NPU has no float64 arithmetic.
    wide = torch.float32 if x.device.type == "npu" else torch.float64
    parts = to_blocks(x.detach(), MX_BLOCK_SIZE), to_blocks(packed, _PACKED_BLOCK), scales.reshape(-1, 1)
    (sums,) = _in_pieces(lambda source, codes, bytes_: (_squared_errors(source, codes, bytes_, wide),), *parts)
    return sums.sum(0)


def mxfp4_encode(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round x to `dtype`, quantize it and measure the error.

    Returns:
        packed values and scales of `mxfp4_quantize(x.to(dtype))`, and their `mxfp4_squared_error`. On an NPU
        `npu_mxfp4_quantize` is used.

    Raises:
        TypeError, ValueError: as `mxfp4_quantize`.
    """
    check_source(x, "x")
    rounded = x.to(dtype)
    packed, scales = npu_mxfp4_quantize(rounded) if x.device.type == "npu" else mxfp4_quantize(rounded)
    return packed, scales, mxfp4_squared_error(rounded, packed, scales)


def npu_mxfp4_quantize(x: torch.Tensor, *, operator: Callable | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as `mxfp4_quantize` with Ascend's operator `torch_npu.npu_dynamic_mx_quant`, and trim its scales.

    Args:
        x: bfloat16 or float16 [..., K] on an NPU, K even.
        operator: replaces the operator of torch_npu, with the same signature; FP4 is its default dtype.

    Returns:
        packed values uint8 [..., K / 2], scales uint8 [..., ceil(K / 32)].

    Raises:
        TypeError, ValueError: as `mxfp4_quantize`, or the operator returned another dtype or shape.
        RuntimeError: torch_npu is not installed, or lacks the operator.
    """
    _check_even(x)
    # `rint` is the default: to nearest, ties to even.
    packed, padded = (operator or npu_operator())(x.detach(), round_mode="rint")
    shape = (*x.shape[:-1], x.shape[-1] // PACKED)
    if packed.element_size() != 1 or tuple(packed.shape) != shape:
        raise ValueError(
            f"npu_dynamic_mx_quant returned {packed.dtype} of shape {tuple(packed.shape)} for an input of shape "
            f"{tuple(x.shape)}, expected {shape} bytes; this torch_npu is not supported"
        )
    return packed.view(torch.uint8), trim_scales(padded, x.shape[-1])


def _check_even(x: torch.Tensor) -> None:
    check_source(x, "x")
    if x.shape[-1] % PACKED:
        raise ValueError(f"x has shape {tuple(x.shape)}: the last dimension must be even, a byte holds two values")


def _check_pair(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Check that packed values and scales belong together; return the scales as uint8."""
    if packed.dtype != torch.uint8 or not packed.dim():
        raise TypeError(f"packed values are {packed.dtype} of shape {tuple(packed.shape)}, expected uint8 [..., K / 2]")
    scales = as_scale_bytes(scales, "scales")
    expected = (*packed.shape[:-1], ceil_div(packed.shape[-1], _PACKED_BLOCK))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}, expected {expected} for packed values of shape "
            f"{tuple(packed.shape)}; scales of npu_dynamic_mx_quant are padded, see trim_scales"
        )
    return scales


def _in_pieces(function: Callable[..., tuple[torch.Tensor, ...]], *blocks: torch.Tensor) -> list[torch.Tensor]:
    """Apply a function of rows to blocks [N, ...] in pieces, and concatenate its results."""
    pieces = zip(*(part.split(EAGER_PIECE // MX_BLOCK_SIZE) for part in blocks), strict=True)
    return [torch.cat(part) for part in zip(*(function(*piece) for piece in pieces), strict=True)]


def _fused_or_in_pieces(
    function: Callable[..., tuple[torch.Tensor, ...]], *blocks: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Do the same, but at once on a GPU, where `torch.compile` fuses the function; it is compiled once."""
    if blocks[0].device.type == "cuda" or torch.compiler.is_compiling() or not len(blocks[0]):
        return fused(function, blocks[0])(*blocks)
    return _in_pieces(function, *blocks)


def _as_rows(parts: Sequence[torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed blocks and scales in the shapes of the result for x."""
    packed, scales = parts
    shape = torch.Size((*x.shape[:-1], x.shape[-1] // PACKED))
    groups = ceil_div(x.shape[-1], MX_BLOCK_SIZE)
    return from_blocks(packed, shape, _PACKED_BLOCK), scales.reshape(*x.shape[:-1], groups)


def _quantize_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [N, 32] of any source dtype to packed codes uint8 [N, 16] and E8M0 bytes uint8 [N].

    The cast works on the bits, so that eager mode, Inductor's C++ and Triton round, saturate and treat NaN alike.
    """
    x = x.float()
    magnitude = x.abs()
    # amax propagates NaN with an undefined sign; the mask removes it for the comparison below.
    top = magnitude.amax(-1, keepdim=True).view(torch.int32) & 0x7FFFFFFF
    special = top >= FLOAT32_INF_BITS
    byte = ((top >> 23) - 2).clamp(0, 254)
    scaled = magnitude * ((254 - byte) << 23).view(torch.float32)
    bits = scaled.view(torch.int32)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    # Adding 2^22 makes 0.5, e2m1's smallest number, the last bit of the sum: the addition rounds, ties to even.
    subnormal = (scaled + 4194304.0).view(torch.int32) - 0x4A800000
    code = torch.where(bits < (127 << 23), subnormal, normal).clamp(max=7)
    code = torch.where(special, 0, code | ((x.view(torch.int32) >> 28) & 8))
    first, second = code.unflatten(-1, (-1, PACKED)).unbind(-1)
    return (first | (second << 4)).to(torch.uint8), torch.where(special, 255, byte).squeeze(-1).to(torch.uint8)


def _dequantize_blocks(packed: torch.Tensor, scale_bytes: torch.Tensor) -> tuple[torch.Tensor]:
    """Dequantize packed codes uint8 [N, 16] with scale_bytes uint8 [N, 1] to float32 [N, 32]."""
    pair, byte = packed.to(torch.int32), scale_bytes.to(torch.int32)
    code = torch.stack([pair & 15, pair >> 4], -1).flatten(-2)
    magnitude = code & 7
    normal = ((magnitude << 22) + (126 << 23)).view(torch.float32)
    decoded = torch.where(magnitude < 2, magnitude.float() * 0.5, normal)
    decoded = torch.where(code >= 8, -decoded, decoded)
    factor = torch.where(byte == 0, 0x00400000, byte << 23).view(torch.float32)
    return (decoded * torch.where(byte == 255, math.nan, factor),)


def _squared_errors(
    x: torch.Tensor, packed: torch.Tensor, scale_bytes: torch.Tensor, wide: torch.dtype
) -> torch.Tensor:
    """Return [1, 2], sum of squared errors and sum of squares, of blocks x [N, 32]."""
    source = x.to(wide)
    error = _dequantize_blocks(packed, scale_bytes)[0].to(wide) - source
    return torch.stack([error.square().sum(), source.square().sum()])[None]
