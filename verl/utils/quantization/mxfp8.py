"""MXFP8 numerics: blocks of 32 float8 e4m3 values along the last dimension that share one power-of-two scale (E8M0).

The format is that of the "OCP Microscaling Formats (MX) Specification", version 1.0 (OCP MX below): MXFP8 and its
block of 32 in section 5.2, the e4m3 element in 5.3.1 (no Inf, largest value 448, NaN is S.1111.111), the E8M0 scale
in 5.4.1 (bias 127, byte 255 is NaN, no zero), conversion to MX in 6.3.

Three implementations give the same bits: on a CPU the loops of `mx_kernels.c`, compiled once per machine; on a GPU
torch operators fused by `torch.compile`; on other devices, and without a compiler, the same torch operators one after
the other, in pieces. Cost on a CPU (4096x4096 bf16, processor time of one thread, AVX-512, as a multiple of a bf16 copy
of the same tensor): the C loops 1.3 to 2; torch.compile 3 to 4, and seconds of compiling in every process; numba 4;
torch operators 40 and more. `benchmarks/quantizer.py` prints this for the current machine.

Known difference to Ascend's `npu_dynamic_mx_quant` (by its published source, not compared on hardware): with scale_alg
0 it writes zeros in a block whose scale byte is 0, that is, if every magnitude is below 2^-118. Here these values are
kept.
"""

import ctypes
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from verl.utils.native import library as native
from verl.utils.quantization.formats import MX_BLOCK_SIZE
from verl.utils.quantization.mx_blocks import (
    EAGER_PIECE,
    FLOAT32_INF_BITS,
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
from verl.utils.tensor_diff import diff_and_update_

_NATIVE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
# e4m3: 448 = 1.75 * 2^8. Adding this to float32 bits carries into the exponent exactly where the mantissa exceeds 1.75.
_ROUND_UP_CARRY = 0x1FFFFF


def mxfp8_quantize(
    x: torch.Tensor,
    *,
    block_size: int = MX_BLOCK_SIZE,
    scale_alg: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize to MXFP8 along the last dimension, by OCP MX section 6.3.

    With amax as the largest magnitude of a block, its scale is 2^(byte - 127), with

    - scale_alg=0: byte = floor(log2(amax)) - 8 + 127, where 8 is e4m3's largest exponent; magnitudes above 448 after
      scaling saturate (OCP MX 6.3);
    - scale_alg=1: the smallest byte for which amax / scale <= 448, so that nothing saturates (the rule of cuBLAS and of
      `npu_dynamic_mx_quant`'s scale_alg 1, which both compute amax / 448 in float32 and round its exponent up);

    clamped to 0..254 (OCP MX 5.4.1). A block of zeros has byte 0. Values are x / scale rounded to the nearest e4m3
    number, ties to even, saturated to +-448, signed zeros kept. A block that holds NaN or Inf gets byte 255, and all
    its values are NaN (0x7F): OCP MX 5.1 makes every value of a block with a NaN scale NaN. A partial last block is
    quantized on its own, as if padded with zeros. The division by a power of two is exact wherever it can matter, so
    the result does not depend on the dtype of the division.

    Args:
        x: float32, bfloat16 or float16, shape [..., K], any strides, K >= 0; not a DTensor. Gradients do not flow.
        block_size: elements per scale, 1 or more; 32 is MXFP8 and the fast path.
        scale_alg: 0 or 1, as above.
        out: (values, scales) to write into instead of new tensors: contiguous, shapes and dtypes of the result.

    Returns:
        values float8_e4m3fn [..., K] and scales uint8 [..., ceil(K / block_size)] (E8M0 bytes), contiguous, on x's
        device.

    Raises:
        TypeError: x is not a plain tensor of one of these dtypes.
        ValueError: x has no dimension, block_size or scale_alg is out of range, or `out` does not fit.
    """
    check_source(x, "x")
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be 1 or more; MXFP8 uses 32")
    if scale_alg not in (0, 1):
        raise ValueError(f"scale_alg={scale_alg}: must be 0 (OCP MX, floor) or 1 (round up)")
    x = x.detach()
    k = x.shape[-1]
    scale_shape = (*x.shape[:-1], ceil_div(k, block_size))
    if out is None:
        values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty(scale_shape, dtype=torch.uint8, device=x.device)
    else:
        values, scales = out
        check_out(values, "out values", x.shape, torch.float8_e4m3fn, x.device)
        check_out(scales, "out scales", scale_shape, torch.uint8, x.device)
    if x.numel() == 0:
        return values, scales
    if block_size == MX_BLOCK_SIZE and (library := _native_library(x.device)) is not None:
        source, stride, rows, k = _as_rows(x)
        kernel = getattr(library, f"mx_quantize_{_NATIVE_NAMES[x.dtype]}")
        pointers = values.data_ptr(), scales.data_ptr()
        kernel(source.data_ptr(), stride, *pointers, rows, k, scale_alg, torch.get_num_threads())
    else:
        _quantize_with_torch(x, values, scales, block_size, scale_alg)
    return values, scales


def mxfp8_dequantize(
    values: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = MX_BLOCK_SIZE,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute values * 2^(scale byte - 127), block by block (OCP MX sections 5.1 and 5.4.1).

    Args:
        values: float8_e4m3fn [..., K].
        scales: uint8 or float8_e8m0fnu [..., ceil(K / block_size)].
        dtype: float32, bfloat16 or float16. The product is exact in float32, except for Inf beyond its range (bytes 246
            and up), and is then rounded to nearest even.
        block_size: elements per scale.
        out: contiguous [..., K] of `dtype` to write into instead of a new tensor. Allocating a new one takes more time
            than the computation.

    Returns:
        [..., K] of `dtype`; NaN for NaN values and for every value of a block whose byte is 255.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; the message names both.
    """
    if dtype not in _NATIVE_NAMES:
        raise TypeError(f"dtype={dtype}: must be float32, bfloat16 or float16")
    if block_size < 1:
        raise ValueError(f"block_size={block_size}: must be 1 or more; MXFP8 uses 32")
    values, scales = _check_pair(values, scales, block_size)
    if out is None:
        out = torch.empty(values.shape, dtype=dtype, device=values.device)
    else:
        check_out(out, "out", values.shape, dtype, values.device)
    if values.numel() == 0:
        return out
    if block_size == MX_BLOCK_SIZE and (library := _native_library(values.device)) is not None:
        native_dtype = torch.float32 if dtype == torch.float16 else dtype
        target = out if native_dtype == dtype else torch.empty(values.shape, dtype=native_dtype)
        values, scales = values.contiguous(), scales.contiguous()
        _, _, rows, k = _as_rows(values)
        kernel = getattr(library, f"mx_dequantize_{_NATIVE_NAMES[native_dtype]}")
        kernel(values.data_ptr(), scales.data_ptr(), target.data_ptr(), rows, k, torch.get_num_threads())
        return target if target is out else out.copy_(target)
    codes, factors = to_blocks(values.view(torch.uint8), block_size), scales.reshape(-1, 1)
    decoded = fused(_dequantize_blocks, codes)(codes, factors)
    return out.copy_(from_blocks(decoded, values.shape, block_size))


class QuantizationError(NamedTuple):
    """Distance of a quantized tensor from its source."""

    relative: float  # Euclidean norm of the error over that of the source; 0 for a source of zeros
    worst_block: float  # largest over blocks of (largest |error| / largest |source|); at most 2^-3 with scale_alg 0


def quantization_error(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> QuantizationError:
    """Return relative errors of (values, scales) [..., K], blocks of 32, against their source x of the same shape.

    Both are NaN if source, values or scales hold NaN or Inf. A `worst_block` of 2^-4 is e4m3's rounding; up to 2^-3 is
    saturation (scale_alg 0 only). Synchronizes with the device.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit; the message names both.
    """
    parts = _error_parts("error", 3, x, values, scales)
    error2, norm2 = parts[:, :2].sum(0).tolist()
    if math.isnan(error2) or math.isnan(norm2):
        return QuantizationError(math.nan, math.nan)
    worst = math.sqrt(parts[:, 2].max().item()) if len(parts) else 0.0
    return QuantizationError(math.sqrt(error2 / norm2) if norm2 else 0.0, worst)


def squared_error(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return [sum of squared errors, sum of squares of x]. They add up over parts of a tensor; arguments as above.

    Returns:
        [2] on x's device, float64 (float32 on an NPU); does not synchronize with the device.
    """
    return _error_parts("squares", 2, x, values, scales).sum(0)


def mxfp8_encode(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round x to `dtype`, quantize it and measure the error; float32 through bfloat16 takes one pass on a CPU.

    Returns:
        values and scales of `mxfp8_quantize(x.to(dtype))`, and their `squared_error`.

    Raises:
        TypeError, ValueError: as `mxfp8_quantize`.
    """
    check_source(x, "x")
    library = _encoding_library(x, dtype)
    if library is None:
        rounded = x.to(dtype)
        values, scales = mxfp8_quantize(rounded)
        return values, scales, squared_error(rounded, values, scales)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty((*x.shape[:-1], ceil_div(x.shape[-1], MX_BLOCK_SIZE)), dtype=torch.uint8)
    return values, scales, _encode(library.mx_encode_f32_bf16, x, values, scales)


def mxfp8_requantize(
    x: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Update `values` and `scales` to those of `mxfp8_encode`; float32 through bfloat16 takes one pass on a CPU.

    Args:
        x: [..., K], as for `mxfp8_encode`.
        values, scales: its result for an earlier x of this shape; changed in place.

    Returns:
        Indices of the changed elements, int64, ascending: in the flattened values, and in the flattened scales. The
        `squared_error` of x rounded to `dtype`.

    Raises:
        TypeError, ValueError: as `mxfp8_quantize`, or `values` and `scales` do not have the shape of x.
    """
    check_source(x, "x")
    values, scales = _check_pair(values, scales, MX_BLOCK_SIZE)
    check_out(values, "values", x.shape, torch.float8_e4m3fn, x.device)
    check_out(scales, "scales", scales.shape, torch.uint8, x.device)
    library = _encoding_library(x, dtype)
    if library is None:
        new_values, new_scales, error = mxfp8_encode(x, dtype)
        return diff_and_update_(values, new_values), diff_and_update_(scales, new_scales), error
    indices = [torch.empty(part.numel(), dtype=torch.int64) for part in (values, scales)]
    counts = torch.empty(2, dtype=torch.int64)
    error = _encode(library.mx_encode_diff_f32_bf16, x, values, scales, *indices, counts)
    values_indices, scales_indices = (
        part[:count].clone() for part, count in zip(indices, counts.tolist(), strict=True)
    )
    return values_indices, scales_indices, error


def _encoding_library(x: torch.Tensor, dtype: torch.dtype) -> ctypes.CDLL | None:
    """Return the compiled kernels if they can round, quantize and measure in one pass; else None."""
    in_one_pass = (x.dtype, dtype) == (torch.float32, torch.bfloat16) and x.numel()
    return _native_library(x.device) if in_one_pass else None


def _encode(
    kernel: Callable, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, *outputs: torch.Tensor
) -> torch.Tensor:
    """Run a kernel that rounds, quantizes and measures in one pass; return the squared error."""
    source, stride, rows, k = _as_rows(x.detach())
    parts = torch.empty(rows * ceil_div(ceil_div(k, MX_BLOCK_SIZE), 64), 2, dtype=torch.float64)
    pointers = (tensor.data_ptr() for tensor in (values, scales, parts))
    more = (tensor.data_ptr() for tensor in outputs)
    kernel(source.data_ptr(), stride, *pointers, rows, k, 0, torch.get_num_threads(), *more)
    return parts.sum(0)


def _error_parts(
    kernel: str, columns: int, x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Return [n, columns] for pieces of x: sum of squared errors, sum of squares, largest squared ratio of a block.

    Args:
        kernel: `error` for all three columns, `squares` for the first two.
    """
    check_source(x, "x")
    values, scales = _check_pair(values, scales, MX_BLOCK_SIZE)
    if x.shape != values.shape:
        raise ValueError(f"x has shape {tuple(x.shape)}, values {tuple(values.shape)}: must be the same")
    x = x.detach()
    if x.numel() and (library := _native_library(x.device)) is not None:
        values, scales = values.contiguous(), scales.contiguous()
        source, stride, rows, k = _as_rows(x)
        runs = rows * ceil_div(ceil_div(k, MX_BLOCK_SIZE), 64)
        parts = torch.empty(runs, columns, dtype=torch.float64)
        measure = getattr(library, f"mx_{kernel}_{_NATIVE_NAMES[x.dtype]}")
        pointers = values.data_ptr(), scales.data_ptr(), parts.data_ptr()
        measure(source.data_ptr(), stride, *pointers, rows, k, torch.get_num_threads())
        return parts
    # An NPU has no float64 arithmetic.
    wide = torch.float32 if x.device.type == "npu" else torch.float64
    pieces = []
    blocks = (to_blocks(x, MX_BLOCK_SIZE), to_blocks(values.view(torch.uint8), MX_BLOCK_SIZE), scales.reshape(-1, 1))
    for source, codes, factors in zip(*(t.split(EAGER_PIECE // MX_BLOCK_SIZE) for t in blocks), strict=True):
        source = source.to(wide)
        error = _dequantize_blocks(codes, factors).to(wide) - source
        top = source.abs().amax(-1)
        ratio = torch.where(top == 0, 0.0, error.abs().amax(-1) / top)
        worst = ratio.max() if len(ratio) else ratio.sum()
        pieces.append(torch.stack([error.square().sum(), source.square().sum(), worst.square()])[:columns])
    return torch.stack(pieces)


def npu_mxfp8_quantize(
    x: torch.Tensor, *, scale_alg: int = 0, operator: Callable | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize as `mxfp8_quantize` with Ascend's operator `torch_npu.npu_dynamic_mx_quant`, and trim its scales.

    Args:
        x: float32, bfloat16 or float16 [..., K], on an NPU.
        scale_alg: 0 or 1, as in `mxfp8_quantize`.
        operator: replaces the operator of torch_npu, with the same signature.

    Returns:
        values float8_e4m3fn [..., K], scales uint8 [..., ceil(K / 32)].

    Raises:
        TypeError, ValueError: as `mxfp8_quantize`, or the operator returned another dtype or shape.
        RuntimeError: torch_npu is not installed, or lacks the operator.
    """
    check_source(x, "x")
    if scale_alg not in (0, 1):
        raise ValueError(f"scale_alg={scale_alg}: must be 0 (OCP MX, floor) or 1 (round up)")
    if operator is None:
        operator = npu_operator()
    # The operator's default dst_type is FP4. Older releases have no scale_alg; its default is 0.
    options = {"scale_alg": scale_alg} if scale_alg else {}
    values, padded = operator(x.detach(), dst_type=torch.float8_e4m3fn, **options)
    if values.dtype == torch.uint8:
        values = values.view(torch.float8_e4m3fn)
    if values.dtype != torch.float8_e4m3fn or values.shape != x.shape:
        raise ValueError(
            f"npu_dynamic_mx_quant returned {values.dtype} of shape {tuple(values.shape)} for an input of shape "
            f"{tuple(x.shape)}, expected float8_e4m3fn of the same shape; this torch_npu is not supported"
        )
    return values, trim_scales(padded, x.shape[-1])


def _check_pair(values: torch.Tensor, scales: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    if values.dtype != torch.float8_e4m3fn:
        raise TypeError(f"values has dtype {values.dtype}, shape {tuple(values.shape)}, expected float8_e4m3fn")
    scales = as_scale_bytes(scales, "scales")
    if values.dim() == 0:
        raise ValueError("values has shape (); it must have at least one dimension, along which blocks run")
    expected = (*values.shape[:-1], ceil_div(values.shape[-1], block_size))
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}, expected {expected} for values of shape {tuple(values.shape)} in "
            f"blocks of {block_size}; scales of npu_dynamic_mx_quant are padded, see trim_scales"
        )
    if scales.device != values.device:
        raise ValueError(f"scales is on {scales.device}, values on {values.device}: must be on one device")
    return values, scales


def _native_library(device: torch.device) -> ctypes.CDLL | None:
    """Return the compiled kernels for real tensors on a CPU, outside a graph that torch.compile traces; else None."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return native.kernels()


def _as_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Return (tensor to read, elements from row to row, rows, row length); copies x if its rows are not contiguous."""
    k = x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1 and not x.is_contiguous():
        return x, x.stride(0), x.shape[0], k
    x = x.contiguous()
    if k % MX_BLOCK_SIZE == 0:
        # No block crosses the end of a row, so all rows are read as one: the kernels' runs stay long for a small K.
        return x, x.numel(), 1, x.numel()
    return x, k, x.numel() // k, k


def _quantize_with_torch(
    x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, block_size: int, scale_alg: int
) -> None:
    carry = _ROUND_UP_CARRY if scale_alg else 0
    blocks = to_blocks(x, block_size)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        pieces = [_quantize_blocks(piece, carry) for piece in blocks.split(max(1, EAGER_PIECE // block_size))]
        codes, scale_bytes = (torch.cat(part) for part in zip(*pieces, strict=True))
    else:
        codes, scale_bytes = fused(_quantize_blocks, blocks)(blocks, carry)
    values.view(torch.uint8).copy_(from_blocks(codes, x.shape, block_size))
    scales.copy_(scale_bytes.reshape(scales.shape))


def _quantize_blocks(x: torch.Tensor, carry: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [N, block] of any source dtype to e4m3 codes uint8 [N, block] and E8M0 bytes uint8 [N].

    The cast works on the bits, so that eager mode, Inductor's C++ and Triton round, saturate and treat NaN alike.
    """
    x = x.float()
    magnitude = x.abs()
    # amax propagates NaN with an undefined sign; the mask removes it for the comparison below.
    top = magnitude.amax(-1, keepdim=True).view(torch.int32) & 0x7FFFFFFF
    special = top >= FLOAT32_INF_BITS
    byte = (((top + carry) >> 23) - 8).clamp(0, 254)
    scaled = magnitude * ((254 - byte) << 23).view(torch.float32)
    bits = scaled.view(torch.int32)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Adding 2^14 makes 2^-9, e4m3's smallest number, the last bit of the sum: the addition rounds, ties to even.
    subnormal = (scaled + 16384.0).view(torch.int32) - 0x46800000
    code = torch.where(bits < (121 << 23), subnormal, normal).clamp(max=0x7E)
    code = torch.where(special, 0x7F, code | ((x.view(torch.int32) >> 24) & 0x80))
    byte = torch.where(special, 255, byte)
    return code.to(torch.uint8), byte.squeeze(-1).to(torch.uint8)


def _dequantize_blocks(codes: torch.Tensor, scale_bytes: torch.Tensor) -> torch.Tensor:
    """Dequantize codes uint8 [N, block] with scale_bytes uint8 [N, 1] to float32 [N, block]."""
    code, byte = codes.to(torch.int32), scale_bytes.to(torch.int32)
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).view(torch.float32)
    decoded = torch.where(magnitude < 8, magnitude.float() * 2.0**-9, normal)
    decoded = torch.where(magnitude == 0x7F, math.nan, decoded)
    decoded = torch.where(code >= 0x80, -decoded, decoded)
    factor = torch.where(byte == 0, 0x00400000, byte << 23).view(torch.float32)
    return decoded * torch.where(byte == 255, math.nan, factor)
