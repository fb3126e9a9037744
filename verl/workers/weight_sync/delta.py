"""The wire format of a delta: the changed elements of each weight in the fewest bytes.

A chunk is a contiguous range of the flattened tensor (the rows that one trainer rank holds). `count` of its `length`
elements have changed. Their new values follow one another; their indices are written in the smallest of four encodings
(`smallest_encoding` compares the exact sizes):

| encoding | bytes of the indices | indices |
|---|---|---|
| index16 | 4 ceil(length / 65536) + 2 count | number in each block of 65536, then their 16-bit positions in it |
| index8 | ceil(length / 256) + count | the same with blocks of 256 and 8-bit numbers and positions |
| bitmap | ceil(length / 8) | one bit per element, the first element in the highest bit |
| full | 0 | none: the values of all elements follow |

Values are never differences: a received element is right whatever its value was before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verl.utils.tensor_diff import bits
from verl.workers.weight_sync.manifest import WeightUpdateError, dtype_from_name, dtype_name
from verl.workers.weight_sync.messages import DeltaChunkMessage

# Values are aligned for every dtype.
_ALIGNMENT = 8
_ENCODINGS = ("index16", "index8", "bitmap", "full")
# log2 of the elements in a block.
_BLOCK_BITS = {"index8": 8, "index16": 16}


@dataclass(frozen=True)
class DeltaChunk:
    """The changed elements in one range of a tensor, and the position of their bytes in a block.

    Attributes:
        name, shape, dtype: of the full tensor, under its checkpoint name.
        start, length: the range of the flattened tensor, in elements.
        encoding: encoding of the indices.
        count: number of values.
        indices_offset, values_offset: offsets in bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    length: int
    encoding: str
    count: int
    indices_offset: int
    values_offset: int

    @property
    def end(self) -> int:
        """Offset behind the last value."""
        return self.values_offset + self.count * dtype_from_name(self.dtype).itemsize

    def moved(self, by: int) -> DeltaChunk:
        """Return the same chunk for a block that begins `by` bytes earlier."""
        return replace(self, indices_offset=self.indices_offset + by, values_offset=self.values_offset + by)

    def to_message(self) -> DeltaChunkMessage:
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "start": self.start,
            "length": self.length,
            "encoding": self.encoding,
            "count": self.count,
            "indices_offset": self.indices_offset,
            "values_offset": self.values_offset,
        }

    @classmethod
    def from_message(cls, message: DeltaChunkMessage) -> DeltaChunk:
        """Return the chunk that a message describes.

        Raises:
            WeightUpdateError: the numbers contradict one another.
        """
        shape = tuple(int(size) for size in message["shape"])
        chunk = cls(
            name=str(message["name"]),
            shape=shape,
            dtype=str(message["dtype"]),
            start=int(message["start"]),
            length=int(message["length"]),
            encoding=str(message["encoding"]),
            count=int(message["count"]),
            indices_offset=int(message["indices_offset"]),
            values_offset=int(message["values_offset"]),
        )
        inside = min(chunk.start, chunk.length) >= 0 and chunk.start + chunk.length <= prod(shape)
        if not inside or not 0 <= chunk.count <= chunk.length or min(chunk.indices_offset, chunk.values_offset) < 0:
            raise WeightUpdateError(
                f"parameter {chunk.name!r} {list(shape)}: a delta of {chunk.count} values for elements {chunk.start} "
                f"to {chunk.start + chunk.length} does not lie inside it"
            )
        return chunk


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def index_bytes(encoding: str, length: int, count: int) -> int:
    """Return the bytes that the indices of `count` of `length` elements take."""
    return {
        "index16": 4 * -(-length // 65536) + 2 * count,
        "index8": -(-length // 256) + count,
        "bitmap": -(-length // 8),
        "full": 0,
    }[encoding]


def smallest_encoding(length: int, count: int, itemsize: int, fullest_block: int) -> str:
    """Return the encoding that takes the fewest bytes.

    Args:
        length: elements in the range.
        count: changed elements.
        itemsize: bytes per element.
        fullest_block: largest number of changed elements in a block of 256. The counts of index8 are bytes, so a block
            with 256 changed elements cannot be encoded by it.
    """
    sizes = {
        name: index_bytes(name, length, count) + count * itemsize
        for name in ("index16", "index8", "bitmap")
        if name != "index8" or fullest_block < 256
    }
    sizes["full"] = length * itemsize
    return min(sizes, key=lambda name: sizes[name])


class DeltaBlock:
    """Collects chunks into one block of bytes."""

    def __init__(self) -> None:
        self.chunks: list[DeltaChunk] = []
        self._parts: list[tuple[int, npt.NDArray[np.uint8]]] = []
        self.nbytes = 0

    def add(
        self, name: str, shape: tuple[int, ...], start: int, new: torch.Tensor, changed: torch.Tensor
    ) -> torch.Tensor:
        """Add the changed elements of a range, if there are any.

        Args:
            name, shape: of the full tensor.
            start: of the range in the flattened tensor.
            new: [length], the present elements of the range.
            changed: [count] int64, ascending: indices of the elements that differ from the last sent ones.

        Returns:
            The values that are sent, on the CPU: the changed elements, or all elements if that is shorter.
        """
        length, count = new.numel(), changed.numel()
        if not count:
            return new[:0]
        indices, encoding = _encode_indices(changed.cpu().numpy(), length, new.element_size())
        values = (new if encoding == "full" else new[changed]).cpu().contiguous()
        indices_offset = _align(self.nbytes)
        values_offset = _align(indices_offset + indices.size)
        chunk = DeltaChunk(
            name,
            tuple(shape),
            dtype_name(new.dtype),
            start,
            length,
            encoding,
            values.numel(),
            indices_offset,
            values_offset,
        )
        self.chunks.append(chunk)
        self._parts += [(indices_offset, indices), (values_offset, bits(values).view(torch.uint8).numpy())]
        self.nbytes = chunk.end
        return values

    def to_bytes(self) -> torch.Tensor:
        """Return the block, uint8 [nbytes]."""
        block = np.zeros(self.nbytes, dtype=np.uint8)
        for offset, part in self._parts:
            block[offset : offset + part.size] = part
        return torch.from_numpy(block)


def _encode_indices(changed: npt.NDArray[Any], length: int, itemsize: int) -> tuple[npt.NDArray[np.uint8], str]:
    """Return the bytes of the indices in the smallest encoding, and its name."""
    # In numpy, whose calls cost a tenth of torch's: most chunks hold some hundred changed elements.
    count = len(changed)
    counts = np.bincount(changed >> 8, minlength=-(-length // 256))
    encoding = smallest_encoding(length, count, itemsize, int(counts.max()))
    if encoding == "full":
        return np.empty(0, dtype=np.uint8), encoding
    if encoding == "bitmap":
        marked = np.zeros(length, dtype=bool)
        marked[changed] = True
        return np.packbits(marked), encoding
    if encoding == "index8":
        return np.concatenate([counts.astype(np.uint8), changed.astype(np.uint8)]), encoding
    counts = np.bincount(changed >> 16, minlength=-(-length // 65536)).astype(np.int32)
    return np.concatenate([counts.view(np.uint8), changed.astype(np.uint16).view(np.uint8)]), encoding


def decode(block: torch.Tensor, chunk: DeltaChunk) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Read a chunk from its block, uint8 [n].

    Returns:
        Indices in the full flattened tensor, int64 [count], ascending; None for all elements of the range. Values
        [count], a view of `block`.

    Raises:
        WeightUpdateError: the chunk does not lie inside the block, or its indices do not lie inside its range.
    """
    size = index_bytes(chunk.encoding, chunk.length, chunk.count) if chunk.encoding in _ENCODINGS else -1
    if size < 0 or chunk.end > block.numel() or chunk.indices_offset + size > block.numel():
        raise WeightUpdateError(
            f"parameter {chunk.name!r}: its delta ({chunk.encoding}, up to byte {chunk.end}) does not lie inside a "
            f"block of {block.numel()} bytes"
        )
    dtype = dtype_from_name(chunk.dtype)
    try:
        values = block[chunk.values_offset : chunk.end].view(dtype)
        indices = _decode_indices(block[chunk.indices_offset : chunk.indices_offset + size], chunk)
    except RuntimeError as error:
        raise WeightUpdateError(f"parameter {chunk.name!r}: its delta is misaligned: {error}") from error
    if indices is None:
        consistent = chunk.count == chunk.length
    else:
        consistent = indices.numel() == chunk.count and (
            not chunk.count or (int(indices[-1]) < chunk.length and bool((indices.diff() > 0).all()))
        )
    if not consistent:
        raise WeightUpdateError(
            f"parameter {chunk.name!r} {list(chunk.shape)}: the indices of its delta are out of range or out of order"
        )
    return (None if indices is None else indices + chunk.start), values


def _decode_indices(raw: torch.Tensor, chunk: DeltaChunk) -> torch.Tensor | None:
    """Return the indices in the range, int64; None for the encoding `full`; none at all if the counts are wrong."""
    if chunk.encoding == "full":
        return None
    if chunk.encoding == "bitmap":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(raw.numpy())))
    shift, numbers = _BLOCK_BITS[chunk.encoding], raw.numpy()
    blocks = -(-chunk.length // (1 << shift))
    low: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
    if shift == 8:
        counts, low = numbers[:blocks].astype(np.int64), numbers[blocks:]
    else:
        counts, low = numbers[: 4 * blocks].view(np.int32).astype(np.int64), numbers[4 * blocks :].view(np.uint16)
    if counts.sum() != chunk.count or (len(counts) and counts.min() < 0):
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.repeat(np.arange(blocks) << shift, counts) + low)
