"""A bucket: several tensors laid out one after the other in one block of bytes, and the table that finds them again."""

from __future__ import annotations

from typing import Any

import torch

from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError, dtype_from_name
from verl.workers.weight_sync.shm import SharedSegment

# A multiple of every element size and of the widest vector load, so that any view of the bytes is aligned.
ALIGNMENT = 256


def align(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class BucketWriter:
    """Fills one shared segment with tensors, in order, until the next one would not fit.

    Args:
        capacity: bytes a bucket should not exceed. A single tensor larger than that gets a bucket of its own.
    """

    def __init__(self, capacity: int):
        self.capacity = align(capacity)
        self._segment: SharedSegment | None = None
        self._entries: list[dict[str, Any]] = []
        self._end = 0

    def reset(self) -> None:
        """Start an empty bucket in the same memory."""
        self._entries, self._end = [], 0

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy `tensor` in and return True, or return False (nothing copied) where it belongs in the next bucket."""
        offset = self.add_bytes(tensor)
        if offset is None:
            return False
        self._entries.append({**TensorSpec.of(name, tensor).to_message(), "offset": offset})
        return True

    def add_bytes(self, tensor: torch.Tensor) -> int | None:
        """As `add`, without an entry for it; where it lies, or None where it belongs in the next bucket."""
        if self._end and self._end + tensor.nbytes > self.capacity:
            return None
        self._require(align(self._end + tensor.nbytes))
        assert self._segment is not None
        offset = self._end
        target = self._segment.bytes[offset : offset + tensor.nbytes]
        # Through a typed view the copy converts layout and device in one pass; an empty tensor has nothing to view.
        if tensor.numel():
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._end = align(offset + tensor.nbytes)
        return offset

    def _require(self, nbytes: int) -> None:
        if self._segment is None:
            self._segment = SharedSegment(max(nbytes, ALIGNMENT))
        elif nbytes > self._segment.nbytes:
            # Doubling keeps the number of remaps small while a small model never pays for a large bucket.
            self._segment.reserve(max(nbytes, min(2 * self._segment.nbytes, self.capacity)))

    def seal(self, *, version: int, index: int, last: bool) -> dict[str, Any]:
        """The bucket's description, in plain strings and numbers: what `read_bucket` takes."""
        segment = self._segment.handle if self._segment is not None else None
        return {
            "version": version,
            "index": index,
            "last": last,
            "nbytes": self._end,
            "segment": segment,
            "entries": list(self._entries),
        }

    def close(self) -> None:
        """Give the memory back."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def read_bucket(memory: torch.Tensor, bucket: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """Views into `memory` (uint8 `[>= bucket["nbytes"]]`) for each entry of the bucket.

    Raises:
        WeightUpdateError: an entry lies outside the bucket, is not aligned, or overlaps the one before it.
    """
    tensors, end = [], 0
    for entry in bucket["entries"]:
        spec, offset = TensorSpec.from_message(entry), int(entry["offset"])
        if offset % ALIGNMENT or offset < end or offset + spec.nbytes > min(int(bucket["nbytes"]), memory.numel()):
            raise WeightUpdateError(
                f"parameter {spec.name!r}: its {spec.nbytes} bytes at offset {offset} do not lie inside bucket "
                f"{bucket['index']} of {bucket['nbytes']} bytes"
            )
        end = offset + spec.nbytes
        dtype = dtype_from_name(spec.dtype)
        view = memory[offset:end].view(dtype).view(spec.shape) if spec.nbytes else torch.empty(spec.shape, dtype=dtype)
        tensors.append((spec.name, view))
    return tensors
