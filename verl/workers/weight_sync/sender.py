"""The trainer's end of a weight update: turns a stream of named tensors, or of what changed in them, into buckets.

Every rank of the trainer iterates its stream, because gathering a shard is collective. One of them packs it with a
`WeightSender`; the others just exhaust theirs, held in step by the collectives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch

from verl.workers.weight_sync.block_gather import PackedBlock
from verl.workers.weight_sync.bucket import BucketWriter, align
from verl.workers.weight_sync.delta import DeltaChunk
from verl.workers.weight_sync.manifest import Manifest, TensorSpec

# Enough of them that little of the loading is left when the last one is filled; each costs a round of calls.
_OVERLAPPING_BUCKETS = 6
_SMALLEST_BUCKET = 8 << 20


def bucket_capacity(most_bytes: int, nbytes: int) -> int:
    """Bytes of a bucket in an update of `nbytes`, where a bucket may have `most_bytes`."""
    return align(min(most_bytes, max(nbytes // _OVERLAPPING_BUCKETS, _SMALLEST_BUCKET)))


class _Packing(Protocol):
    """What a stream consists of, and how it goes into buckets."""

    @property
    def num_buckets(self) -> int:
        """Sealed so far."""

    @property
    def waits(self) -> bool:
        """Whether something was added that is not sealed yet."""

    def add(self, writer: BucketWriter, item: Any) -> bool:
        """Whether an item of the stream fitted."""

    def seal(self, writer: BucketWriter, *, last: bool) -> dict[str, Any]: ...

    def manifest(self) -> dict[str, Any]: ...


class WeightSender:
    """Packs an export into a ring of buckets: bucket `k` stays valid until bucket `k + buckets_in_flight` is asked for.

    A model that would fit into one bucket is sent in several smaller ones, once its size is known from the first
    update.

    Args:
        bucket_bytes: size of a bucket in bytes, at most.
        buckets_in_flight: buckets in memory at a time.

    Attributes:
        seconds: spent in `next_bucket` since the update began.
        nbytes: bytes of the last update that sent everything.
    """

    def __init__(self, bucket_bytes: int, buckets_in_flight: int = 2):
        if bucket_bytes <= 0:
            raise ValueError(f"bucket size of {bucket_bytes} bytes: must be positive")
        if buckets_in_flight < 2:
            raise ValueError(f"{buckets_in_flight} buckets in flight: must be 2 or more, one filled, one loaded")
        self._bucket_bytes = bucket_bytes
        self._writers = [BucketWriter(bucket_bytes) for _ in range(buckets_in_flight)]
        self._packing: _Packing | None = None
        self._stream: Iterator[Any] | None = None
        self._waiting: Any = None
        self.seconds = 0.0
        self.nbytes = 0

    def begin(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Start an update that sends everything; one that was not finished is forgotten."""
        self._begin(_Whole(version), named_tensors)

    def begin_delta(self, version: int, base: int, blocks: Iterable[PackedBlock | None]) -> None:
        """Start an update that sends what changed since version `base`; at a None what came so far is sent."""
        self._begin(_Delta(version, base), blocks)

    def _begin(self, packing: _Packing, stream: Iterable[Any]) -> None:
        if self.nbytes:
            for writer in self._writers:
                writer.capacity = bucket_capacity(self._bucket_bytes, self.nbytes)
        self._packing, self._stream, self._waiting = packing, iter(stream), None
        self.seconds = 0.0

    @torch.no_grad()
    def next_bucket(self) -> dict[str, Any]:
        """Fill the next bucket and describe it; `last` is true on the final one."""
        assert self._packing is not None, "begin() first"
        started = time.perf_counter()
        writer = self._writers[self._packing.num_buckets % len(self._writers)]
        writer.reset()
        last = self._fill(writer, self._packing)
        if last and isinstance(self._packing, _Whole):
            self.nbytes = self._packing.nbytes
        self.seconds += time.perf_counter() - started
        return self._packing.seal(writer, last=last)

    def _fill(self, writer: BucketWriter, packing: _Packing) -> bool:
        """True where the stream ended with this bucket."""
        assert self._stream is not None
        if self._waiting is not None:
            packing.add(writer, self._waiting)
            self._waiting = None
        for item in self._stream:
            if item is None:
                if packing.waits:
                    return False
                continue
            if not packing.add(writer, item):
                self._waiting = item
                return False
        return True

    def manifest(self) -> dict[str, Any]:
        """What the whole update consisted of, in plain strings and numbers."""
        assert self._packing is not None, "begin() first"
        return self._packing.manifest()

    def abort(self) -> None:
        """Exhaust the stream without sending it."""
        for _ in self._stream or ():
            pass
        self._stream = None

    def close(self) -> None:
        """Give the shared memory back."""
        for writer in self._writers:
            writer.close()


class _Whole:
    """Checkpoint tensors, each in one piece."""

    def __init__(self, version: int):
        self._manifest = Manifest(version)
        self.nbytes = 0

    @property
    def num_buckets(self) -> int:
        return self._manifest.num_buckets

    @property
    def waits(self) -> bool:
        return self.nbytes > 0

    def add(self, writer: BucketWriter, item: tuple[str, torch.Tensor]) -> bool:
        if not writer.add(*item):
            return False
        self._manifest.add(TensorSpec.of(*item))
        self.nbytes += item[1].nbytes
        return True

    def seal(self, writer: BucketWriter, *, last: bool) -> dict[str, Any]:
        self._manifest.num_buckets += 1
        return writer.seal(version=self._manifest.version, index=self.num_buckets - 1, last=last)

    def manifest(self) -> dict[str, Any]:
        return self._manifest.to_message()


class _Delta:
    """Blocks of what changed, several of them in a bucket."""

    def __init__(self, version: int, base: int):
        self._version, self._base = version, base
        self.num_buckets = self._num_pieces = self._num_values = 0
        self._pieces: list[DeltaChunk] = []

    @property
    def waits(self) -> bool:
        return bool(self._pieces)

    def add(self, writer: BucketWriter, item: PackedBlock) -> bool:
        pieces, memory = item
        offset = writer.add_bytes(memory)
        if offset is None:
            return False
        self._pieces += [piece.moved(offset) for piece in pieces]
        return True

    def seal(self, writer: BucketWriter, *, last: bool) -> dict[str, Any]:
        pieces, self._pieces = self._pieces, []
        self.num_buckets += 1
        self._num_pieces += len(pieces)
        self._num_values += sum(piece.count for piece in pieces)
        sealed = writer.seal(version=self._version, index=self.num_buckets - 1, last=last)
        return {**sealed, "base": self._base, "chunks": [piece.to_message() for piece in pieces]}

    def manifest(self) -> dict[str, Any]:
        return {
            "version": self._version,
            "base": self._base,
            "num_buckets": self.num_buckets,
            "num_chunks": self._num_pieces,
            "num_values": self._num_values,
        }
