"""What changed in a weight since it was sent last, in the fewest bytes: the wire format of a delta update.

A piece is a contiguous range of the flattened tensor (the rows that one trainer rank holds). Of its `length` elements
`count` have changed; their new values follow one after the other, and where they belong is written in whichever way is
smallest for that piece (`encode` compares the exact sizes):

| encoding | places | bytes of the places |
|---|---|---|
| index16 | changes in each block of 65536, then each one's place in its block | 4 ceil(length / 65536) + 2 count |
| index8 | the same with blocks of 256 | ceil(length / 256) + count |
| bitmap | one bit an element, the first one highest | ceil(length / 8) |
| whole | none: all elements follow | 0 |

Values are never differences: an element that is sent is right whatever stood there before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from verl.utils.tensor_diff import bits
from verl.workers.weight_sync.manifest import WeightUpdateError, dtype_from_name, dtype_name

# Values are aligned for every dtype.
_ALIGNMENT = 8
_ENCODINGS = ("index16", "index8", "bitmap", "whole")
_BLOCKS = {"index8": 8, "index16": 16}


@dataclass(frozen=True)
class DeltaChunk:
    """What changed in one range of a tensor, and where its bytes are in the block they travel in.

    Attributes:
        name, shape, dtype: of the whole tensor, under its checkpoint name.
        start, length: the range of the flattened tensor, in elements.
        encoding: how the places are written.
        count: elements that follow.
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
        """The same piece in a block that begins `by` bytes earlier."""
        return replace(self, indices_offset=self.indices_offset + by, values_offset=self.values_offset + by)

    def to_message(self) -> dict[str, Any]:
        # Not asdict, which takes a tenth of a millisecond; a mixture of experts has tens of thousands of pieces.
        return {**vars(self), "shape": list(self.shape)}

    @classmethod
    def from_message(cls, plain: dict[str, Any]) -> DeltaChunk:
        """Raises WeightUpdateError where the numbers contradict each other."""
        numbers = {key: int(plain[key]) for key in ("start", "length", "count", "indices_offset", "values_offset")}
        shape = tuple(int(size) for size in plain["shape"])
        piece = cls(str(plain["name"]), shape, str(plain["dtype"]), encoding=str(plain["encoding"]), **numbers)
        inside = min(piece.start, piece.length) >= 0 and piece.start + piece.length <= prod(shape)
        if not inside or not 0 <= piece.count <= piece.length or min(piece.indices_offset, piece.values_offset) < 0:
            raise WeightUpdateError(
                f"parameter {piece.name!r} {list(shape)}: a delta of {piece.count} values for elements {piece.start} "
                f"to {piece.start + piece.length} does not lie inside it"
            )
        return piece


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def index_bytes(encoding: str, length: int, count: int) -> int:
    """Bytes that the places of `count` of `length` elements take."""
    return {
        "index16": 4 * -(-length // 65536) + 2 * count,
        "index8": -(-length // 256) + count,
        "bitmap": -(-length // 8),
        "whole": 0,
    }[encoding]


def smallest_encoding(length: int, count: int, itemsize: int, fullest_block: int) -> str:
    """The encoding of fewest bytes.

    Args:
        itemsize: bytes of an element.
        fullest_block: changed elements in the block of 256 that has most of them; 256 do not fit index8's counts.
    """
    sizes = {
        name: index_bytes(name, length, count) + count * itemsize
        for name in ("index16", "index8", "bitmap")
        if name != "index8" or fullest_block < 256
    }
    sizes["whole"] = length * itemsize
    return min(sizes, key=lambda name: sizes[name])


class DeltaBlock:
    """Collects pieces into one block of bytes."""

    def __init__(self) -> None:
        self.chunks: list[DeltaChunk] = []
        self._parts: list[tuple[int, np.ndarray]] = []
        self.nbytes = 0

    def add(
        self, name: str, shape: tuple[int, ...], start: int, new: torch.Tensor, changed: torch.Tensor
    ) -> torch.Tensor:
        """Add what changed in a range; nothing where nothing did.

        Args:
            name, shape: of the whole tensor.
            start: of the range in the flattened tensor.
            new: [length], its present elements.
            changed: [count] int64, ascending: which of them differ from what was sent before.

        Returns:
            The values that are sent, on the CPU: of what changed, or where that is shorter of all.
        """
        length, count = new.numel(), changed.numel()
        if not count:
            return new[:0]
        places, encoding = _encode_places(changed.cpu().numpy(), length, new.element_size())
        values = (new if encoding == "whole" else new[changed]).cpu().contiguous()
        indices_offset = _align(self.nbytes)
        values_offset = _align(indices_offset + places.size)
        piece = DeltaChunk(
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
        self.chunks.append(piece)
        self._parts += [(indices_offset, places), (values_offset, bits(values).view(torch.uint8).numpy())]
        self.nbytes = piece.end
        return values

    def to_bytes(self) -> torch.Tensor:
        """The block, uint8 [nbytes]."""
        block = np.zeros(self.nbytes, dtype=np.uint8)
        for offset, part in self._parts:
            block[offset : offset + part.size] = part
        return torch.from_numpy(block)


def _encode_places(changed: np.ndarray, length: int, itemsize: int) -> tuple[np.ndarray, str]:
    # In numpy, whose calls cost a tenth of torch's: most pieces hold some hundred changes.
    count = len(changed)
    counts = np.bincount(changed >> 8, minlength=-(-length // 256))
    encoding = smallest_encoding(length, count, itemsize, int(counts.max()))
    if encoding == "whole":
        return np.empty(0, dtype=np.uint8), encoding
    if encoding == "bitmap":
        marked = np.zeros(length, dtype=bool)
        marked[changed] = True
        return np.packbits(marked), encoding
    if encoding == "index8":
        return np.concatenate([counts.astype(np.uint8), changed.astype(np.uint8)]), encoding
    counts = np.bincount(changed >> 16, minlength=-(-length // 65536)).astype(np.int32)
    return np.concatenate([counts.view(np.uint8), changed.astype(np.uint16).view(np.uint8)]), encoding


def decode(block: torch.Tensor, piece: DeltaChunk) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Places in the whole flattened tensor, int64 [count] ascending (None for all of the range), and values [count].

    Values are a view of `block`.

    Raises:
        WeightUpdateError: the piece does not lie inside the block, or its places outside its range.
    """
    size = index_bytes(piece.encoding, piece.length, piece.count) if piece.encoding in _ENCODINGS else -1
    if size < 0 or piece.end > block.numel() or piece.indices_offset + size > block.numel():
        raise WeightUpdateError(
            f"parameter {piece.name!r}: its delta ({piece.encoding}, up to byte {piece.end}) does not lie inside a "
            f"block of {block.numel()} bytes"
        )
    dtype = dtype_from_name(piece.dtype)
    try:
        values = block[piece.values_offset : piece.end].view(dtype)
        places = _decode_places(block[piece.indices_offset : piece.indices_offset + size], piece)
    except RuntimeError as error:
        raise WeightUpdateError(f"parameter {piece.name!r}: its delta is misaligned: {error}") from error
    if places is None:
        consistent = piece.count == piece.length
    else:
        consistent = places.numel() == piece.count and (
            not piece.count or (int(places[-1]) < piece.length and bool((places.diff() > 0).all()))
        )
    if not consistent:
        raise WeightUpdateError(
            f"parameter {piece.name!r} {list(piece.shape)}: the places of its delta are out of range or out of order"
        )
    return (None if places is None else places + piece.start), values


def _decode_places(raw: torch.Tensor, piece: DeltaChunk) -> torch.Tensor | None:
    if piece.encoding == "whole":
        return None
    if piece.encoding == "bitmap":
        return torch.from_numpy(np.flatnonzero(np.unpackbits(raw.numpy())))
    shift, numbers = _BLOCKS[piece.encoding], raw.numpy()
    blocks = -(-piece.length // (1 << shift))
    if shift == 8:
        counts, low = numbers[:blocks].astype(np.int64), numbers[blocks:]
    else:
        counts, low = numbers[: 4 * blocks].view(np.int32).astype(np.int64), numbers[4 * blocks :].view(np.uint16)
    if counts.sum() != piece.count or (len(counts) and counts.min() < 0):
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.repeat(np.arange(blocks) << shift, counts) + low)
