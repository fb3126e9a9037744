"""Shared by the MX formats: blocks along the last dimension, checks of tensors, and Ascend's operator.

The formats are those of the "OCP Microscaling Formats (MX) Specification", version 1.0 (OCP MX below): 32 elements
along the last dimension share one E8M0 scale byte (section 5.4.1: bias 127, byte 255 is NaN, no zero).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

from verl.utils.quantization.formats import MX_BLOCK_SIZE

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOAT32_INF_BITS = 0x7F800000
# Elements per piece of the uncompiled path on a CPU: bounds its dozen int32 temporaries, and is enough for threads.
EAGER_PIECE = 1 << 22
# Below this size a GPU kernel is launch-bound, so compiling it does not pay off.
_COMPILE_FROM = 1 << 20


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def check_source(x: torch.Tensor, name: str) -> None:
    """Check a tensor to quantize: TypeError for another dtype or a DTensor, ValueError for no dimension."""
    if not isinstance(x, torch.Tensor) or hasattr(x, "to_local"):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a plain tensor (for a DTensor, pass `.to_local()`)")
    if x.dtype not in SOURCE_DTYPES:
        raise TypeError(
            f"{name} has dtype {x.dtype}, shape {tuple(x.shape)}; the dtype must be float32, bfloat16 or float16"
        )
    if x.dim() == 0:
        raise ValueError(
            f"{name} has shape () and dtype {x.dtype}; it must have at least one dimension, along which blocks run"
        )


def check_out(
    tensor: torch.Tensor, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Check a tensor to write into: ValueError if it is not contiguous or has another shape, dtype or device."""
    fits = tensor.shape == tuple(shape) and tensor.dtype == dtype and tensor.device == device
    if not fits or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}, "
            f"expected contiguous {dtype} {tuple(shape)} on {device}"
        )


def as_scale_bytes(scales: torch.Tensor, name: str) -> torch.Tensor:
    """Return E8M0 scales as uint8; TypeError for another dtype than uint8 and float8_e8m0fnu."""
    if scales.dtype == torch.float8_e8m0fnu:
        return scales.view(torch.uint8)
    if scales.dtype != torch.uint8:
        raise TypeError(
            f"{name} has dtype {scales.dtype}, shape {tuple(scales.shape)}; E8M0 bytes must be uint8 or float8_e8m0fnu"
        )
    return scales


def to_blocks(x: torch.Tensor, block_size: int) -> torch.Tensor:
    """Reshape [..., K] to [number of blocks, block_size]; the last block of each row is padded with zeros."""
    short = -x.shape[-1] % block_size
    return (F.pad(x, (0, short)) if short else x).reshape(-1, block_size)


def from_blocks(blocks: torch.Tensor, shape: torch.Size, block_size: int) -> torch.Tensor:
    """Invert `to_blocks`."""
    groups = ceil_div(shape[-1], block_size)
    return blocks.reshape(*shape[:-1], groups * block_size)[..., : shape[-1]].contiguous()


def trim_scales(padded: torch.Tensor, k: int, *, block_size: int = MX_BLOCK_SIZE) -> torch.Tensor:
    """Remove the padding that `npu_dynamic_mx_quant` adds to the scales of K values for an even number of blocks.

    Args:
        padded: uint8 or float8_e8m0fnu [..., ceil(ceil(K / block_size) / 2), 2], as the operator returns it.
        k: K, the length of the quantized dimension.

    Returns:
        uint8 [..., ceil(K / block_size)], contiguous.

    Raises:
        TypeError, ValueError: a dtype that is not supported, or a shape that does not fit K.
    """
    padded = as_scale_bytes(padded, "padded")
    groups = ceil_div(k, block_size)
    expected = (ceil_div(groups, 2), 2)
    if tuple(padded.shape[-2:]) != expected:
        raise ValueError(
            f"padded scales have shape {tuple(padded.shape)}, expected [..., {expected[0]}, 2] for {k} values in "
            f"blocks of {block_size}; check that they are not trimmed yet and belong to this tensor"
        )
    return padded.flatten(-2)[..., :groups].contiguous()


@functools.cache
def npu_operator() -> Callable:
    """Return `torch_npu.npu_dynamic_mx_quant`; RuntimeError if torch_npu is not installed or lacks it."""
    try:
        return importlib.import_module("torch_npu").npu_dynamic_mx_quant
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"npu_dynamic_mx_quant is not available ({error}): MX formats need a torch_npu built for Ascend 950"
        ) from error


def fused(function: Callable, blocks: torch.Tensor) -> Callable:
    """Return `function` compiled if the blocks are on a GPU that Triton supports and large enough; else unchanged."""
    if blocks.device.type != "cuda" or blocks.numel() < _COMPILE_FROM or torch.compiler.is_compiling():
        return function
    return _compiled(function) if _triton_works() else function


@functools.cache
def _compiled(function: Callable) -> Callable:
    # Blocks are rows of a matrix for every layer, and the only dynamic dimension is their number: no recompilation from
    # layer to layer.
    return torch.compile(function, dynamic=True)


@functools.cache
def _triton_works() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()
