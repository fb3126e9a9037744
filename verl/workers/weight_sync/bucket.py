"""A bucket: several tensors one after the other in one block of bytes, and the table of their positions."""

from __future__ import annotations

import torch

from verl.workers.weight_sync.manifest import TensorSpec, WeightUpdateError, dtype_from_name
from verl.workers.weight_sync.messages import Bucket, TensorEntry
from verl.workers.weight_sync.shm import SharedSegment

# A multiple of every element size and of the widest vector load, so that any view of the bytes is aligned.
ALIGNMENT = 256
_ROW = 1024  # words of a row in `checksum`: long enough for vector instructions


def align(nbytes: int) -> int:
    """Round `nbytes` up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def checksum(memory: torch.Tensor) -> int:
    """Return a number that changes if bytes of `memory` change, or if blocks of 8 KiB are exchanged.

    It is the sum of the 64-bit words modulo 2^64, the words of the i-th block weighted with 2 i + 1. It runs at the
    speed of the memory; it protects against faults, not against an attacker.

    Args:
        memory: uint8 [n], n a multiple of 8.
    """
    words = memory.view(torch.int64)
    blocks = words.numel() // _ROW
    sums = words[: blocks * _ROW].view(blocks, _ROW).sum(1)
    rest = words[blocks * _ROW :].sum() * (2 * blocks + 1)
    return int((sums * (2 * torch.arange(blocks) + 1)).sum() + rest)


class BucketWriter:
    """Fills a shared segment with tensors in order, until the next tensor would not fit.

    Args:
        capacity: size limit of a bucket in bytes. A single tensor larger than that gets its own bucket.
    """

    def __init__(self, capacity: int):
        self.capacity = align(capacity)
        self._segment: SharedSegment | None = None
        self._entries: list[TensorEntry] = []
        self._end = 0

    @property
    def empty(self) -> bool:
        """Whether the bucket holds no bytes yet."""
        return self._end == 0

    def reset(self) -> None:
        """Start an empty bucket in the same memory."""
        self._entries, self._end = [], 0

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Copy `tensor` into the bucket and return True, or return False if it belongs in the next bucket."""
        offset = self.add_bytes(tensor)
        if offset is None:
            return False
        self._entries.append({**TensorSpec.of(name, tensor).to_message(), "offset": offset})
        return True

    def add_bytes(self, tensor: torch.Tensor) -> int | None:
        """Copy `tensor` into the bucket without an entry for it.

        Returns:
            Offset of its first byte; None if it belongs in the next bucket.
        """
        if self._end and self._end + tensor.nbytes > self.capacity:
            return None
        segment = self._require(align(self._end + tensor.nbytes))
        offset = self._end
        target = segment.bytes[offset : offset + tensor.nbytes]
        # Through a typed view the copy converts layout and device in one pass. An empty tensor has nothing to view.
        if tensor.numel():
            target.view(tensor.dtype).view(tensor.shape).copy_(tensor)
        self._end = align(offset + tensor.nbytes)
        return offset

    def _require(self, nbytes: int) -> SharedSegment:
        """Return the segment, grown to at least `nbytes`."""
        if self._segment is None:
            self._segment = SharedSegment(max(nbytes, ALIGNMENT))
        elif nbytes > self._segment.nbytes:
            # Doubling keeps the number of remaps small, while a small model never pays for a large bucket.
            self._segment.reserve(max(nbytes, min(2 * self._segment.nbytes, self.capacity)))
        return self._segment

    def seal(self, *, version: int, index: int, last: bool) -> Bucket:
        """Return the description of the bucket, from which `read_bucket` reads it."""
        return {
            "version": version,
            "index": index,
            "last": last,
            "nbytes": self._end,
            "segment": self._segment.handle if self._segment is not None else None,
            "checksum": 0 if self._segment is None else checksum(self._segment.bytes[: self._end]),
            "entries": list(self._entries),
        }

    def close(self) -> None:
        """Release the memory."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None


def read_bucket(memory: torch.Tensor, bucket: Bucket) -> list[tuple[str, torch.Tensor]]:
    """Return the name and the tensor of each entry of a bucket; the tensors are views into `memory`.

    Args:
        memory: uint8 [n], n >= `bucket["nbytes"]`.

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


def check_bytes(memory: torch.Tensor, bucket: Bucket) -> None:
    """Check that a bucket has the bytes that its sender wrote.

    A receiver calls it after it has read the bucket, so that it also finds bytes that changed meanwhile.

    Args:
        memory: uint8 [n], n >= `bucket["nbytes"]`.

    Raises:
        WeightUpdateError: it has other bytes.
    """
    nbytes = int(bucket["nbytes"])
    if checksum(memory[:nbytes]) != int(bucket["checksum"]):
        raise WeightUpdateError(
            f"bucket {bucket['index']} of version {bucket['version']}: its {nbytes} bytes changed after the "
            "sender wrote them: a fault of the memory or of the transport"
        )
