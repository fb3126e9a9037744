"""Which elements of a tensor differ from what is kept of it, and keeping them."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from verl.utils.native import library as native

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A view as integers of the same size: equal where the bytes are, NaN and -0.0 included."""
    return tensor.view(_BITS[tensor.element_size()])


def diff_and_update_(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Write what differs between two tensors of one dtype and shape, by its bytes, from `now` into `kept`.

    Args:
        kept, now: of any dtype, contiguous.

    Returns:
        The places of what differed in the flattened tensor, int64 [count], ascending, on the tensors' device.

    Raises:
        ValueError: they are not of one shape and dtype.
    """
    if kept.dtype != now.dtype:
        raise _mismatch(kept, now)
    return _take(kept, now, f"{8 * now.element_size()}")


def diff_and_update_rounded_(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """`diff_and_update_` of `now` rounded to the dtype of `kept`; float32 to bfloat16 in one pass of a CPU's memory."""
    in_one_pass = (kept.dtype, now.dtype) == (torch.bfloat16, torch.float32) and _kernels(now) is not None
    return _take(kept, now, "f32_bf16") if in_one_pass else diff_and_update_(kept, now.to(kept.dtype))


def _take(kept: torch.Tensor, now: torch.Tensor, kernel: str) -> torch.Tensor:
    if kept.shape != now.shape or not (kept.is_contiguous() and now.is_contiguous()):
        raise _mismatch(kept, now)
    library = _kernels(now)
    if library is None:
        old, new = bits(kept.view(-1)), bits(now.view(-1))
        places = _places(old != new)
        old[places] = new[places]
        return places
    # Pages that no place is written to are never backed by memory.
    places = torch.empty(now.numel(), dtype=torch.int64)
    take = getattr(library, f"diff_and_update_{kernel}")
    count = take(kept.data_ptr(), now.data_ptr(), now.numel(), places.data_ptr(), torch.get_num_threads())
    return places[:count].clone()


def _kernels(now: torch.Tensor) -> ctypes.CDLL | None:
    return native.kernels() if now.device.type == "cpu" and now.numel() else None


def _mismatch(kept: torch.Tensor, now: torch.Tensor) -> ValueError:
    return ValueError(f"{kept.dtype} {list(kept.shape)} is kept, {now.dtype} {list(now.shape)} is there now")


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask [n] is set, int64; on a CPU by numpy, which is faster at it."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(-1)
