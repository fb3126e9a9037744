"""Differences between a tensor and an earlier copy of it: find the indices and update the copy in one pass."""

from __future__ import annotations

import ctypes

import numpy as np
import torch

from verl.utils.native import library as native

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """View a tensor as integers of the same size, which are equal if the bytes are, NaN and -0.0 included."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def diff_and_update_(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Copy the elements of `now` that differ from `kept`, by their bytes, into `kept`.

    Args:
        kept, now: two contiguous tensors of one shape and one dtype, which may be any.

    Returns:
        Indices of the differing elements in the flattened tensor, int64 [count], ascending, on the tensors' device.

    Raises:
        ValueError: shape or dtype differ, or a tensor is not contiguous.
    """
    if kept.dtype != now.dtype:
        raise _mismatch(kept, now)
    return _diff_and_update(kept, now, f"{8 * now.element_size()}")


def diff_and_update_rounded_(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Do the same for `now` rounded to the dtype of `kept`; float32 to bfloat16 takes one pass on a CPU."""
    in_one_pass = (kept.dtype, now.dtype) == (torch.bfloat16, torch.float32) and _kernels(now) is not None
    if in_one_pass:
        return _diff_and_update(kept, now, "f32_bf16")
    return diff_and_update_(kept, now.to(kept.dtype))


def _diff_and_update(kept: torch.Tensor, now: torch.Tensor, kernel: str) -> torch.Tensor:
    if kept.shape != now.shape or not (kept.is_contiguous() and now.is_contiguous()):
        raise _mismatch(kept, now)
    library = _kernels(now)
    if library is None:
        old, new = bits(kept.view(-1)), bits(now.view(-1))
        indices = _true_indices(old != new)
        old[indices] = new[indices]
        return indices
    # The operating system backs only those pages with memory that indices are written to.
    indices = torch.empty(now.numel(), dtype=torch.int64)
    function = getattr(library, f"diff_and_update_{kernel}")
    count = function(kept.data_ptr(), now.data_ptr(), now.numel(), indices.data_ptr(), torch.get_num_threads())
    return indices[:count].clone()


def _kernels(now: torch.Tensor) -> ctypes.CDLL | None:
    return native.kernels() if now.device.type == "cpu" and now.numel() else None


def _mismatch(kept: torch.Tensor, now: torch.Tensor) -> ValueError:
    return ValueError(
        f"cannot compare the kept {kept.dtype} {list(kept.shape)} with {now.dtype} {list(now.shape)}: both must be "
        "contiguous and of one shape and dtype"
    )


def _true_indices(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the true elements of a mask [n], int64; numpy is faster at it on a CPU."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(-1)
