"""Which elements of a tensor differ from what is kept of it, and keeping them."""

from __future__ import annotations

import numpy as np
import torch

from verl.utils.quantization import native
from verl.workers.rollout.weight_sync.delta import bits


def take_changes(kept: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Write what differs between two flat tensors of one dtype, by its bytes, from `now` into `kept`.

    Args:
        kept, now: [n], of any dtype.

    Returns:
        The places of what differed, int64 [count], ascending, on the tensors' device.

    Raises:
        ValueError: they are not of one size and dtype.
    """
    if (kept.dtype, kept.shape) != (now.dtype, now.shape) or not (kept.is_contiguous() and now.is_contiguous()):
        raise ValueError(f"{kept.dtype} {list(kept.shape)} is kept, {now.dtype} {list(now.shape)} is there now")
    old, new = bits(kept), bits(now)
    library = native.kernels() if now.device.type == "cpu" and now.numel() else None
    if library is None:
        places = _places(old != new)
        old[places] = new[places]
        return places
    # Pages that no place is written to are never backed by memory.
    places = torch.empty(now.numel(), dtype=torch.int64)
    take = getattr(library, f"take_changes_{8 * now.element_size()}")
    count = take(old.data_ptr(), new.data_ptr(), now.numel(), places.data_ptr(), torch.get_num_threads())
    return places[:count].clone()


def _places(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask [n] is set, int64; on a CPU by numpy, which is faster at it."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(-1)
