"""The trainer's end of a weight update: packs a stream of named tensors, or of delta blocks, into buckets.

Every rank of the trainer iterates its stream, because gathering a shard is collective. Rank 0 packs its stream with a
`WeightSender`. The other ranks only exhaust theirs; the collectives keep them in step.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch

from verl.workers.weight_sync.block_gather import PackedBlock
from verl.workers.weight_sync.bucket import BucketWriter, align
from verl.workers.weight_sync.delta import DeltaChunk
from verl.workers.weight_sync.manifest import Manifest, TensorSpec
from verl.workers.weight_sync.messages import Bucket, DeltaBucket, DeltaManifest, FullManifest, ManifestMessage

# With this many buckets little is left to load when the last one is filled. Each bucket costs a round of calls.
_OVERLAPPING_BUCKETS = 6
_SMALLEST_BUCKET = 8 << 20

Item = TypeVar("Item")


def bucket_capacity(most_bytes: int, nbytes: int) -> int:
    """Return the bytes per bucket for an update of `nbytes`, if a bucket may have `most_bytes`."""
    return align(min(most_bytes, max(nbytes // _OVERLAPPING_BUCKETS, _SMALLEST_BUCKET)))


class WeightSender:
    """Packs an export into a ring of buckets: bucket `k` stays valid until bucket `k + buckets_in_flight` is requested.

    From the second update on the size of the model is known. A model that would fit into one bucket is then sent in
    several smaller ones.

    Args:
        bucket_bytes: size limit of a bucket in bytes.
        buckets_in_flight: number of buckets in memory at the same time.

    Attributes:
        seconds: time spent in `next_bucket` since the update began.
        nbytes: bytes of the last full update.
    """

    def __init__(self, bucket_bytes: int, buckets_in_flight: int = 2):
        if bucket_bytes <= 0:
            raise ValueError(f"bucket_bytes={bucket_bytes}: must be positive")
        if buckets_in_flight < 2:
            raise ValueError(
                f"buckets_in_flight={buckets_in_flight}: must be 2 or more, so that one is filled while one is loaded"
            )
        self._bucket_bytes = bucket_bytes
        self._writers = [BucketWriter(bucket_bytes) for _ in range(buckets_in_flight)]
        self._packer: _FullPacker | _DeltaPacker | None = None
        self.seconds = 0.0
        self.nbytes = 0

    def begin(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Start a full update. An unfinished update is dropped."""
        self._begin(_FullPacker(version, named_tensors))

    def begin_delta(self, version: int, base: int, blocks: Iterable[PackedBlock | None]) -> None:
        """Start a delta against version `base`. None in the stream ends a bucket: its blocks are sent at once."""
        self._begin(_DeltaPacker(version, base, blocks))

    def _begin(self, packer: _FullPacker | _DeltaPacker) -> None:
        if self.nbytes:
            for writer in self._writers:
                writer.capacity = bucket_capacity(self._bucket_bytes, self.nbytes)
        self._packer = packer
        self.seconds = 0.0

    @torch.no_grad()
    def next_bucket(self) -> Bucket:
        """Fill the next bucket and describe it; `last` is true on the final one."""
        packer = self._require_packer()
        started = time.perf_counter()
        writer = self._writers[packer.num_buckets % len(self._writers)]
        writer.reset()
        last = packer.fill(writer)
        if last and isinstance(packer, _FullPacker):
            self.nbytes = packer.nbytes
        self.seconds += time.perf_counter() - started
        return packer.seal(writer, last=last)

    def manifest(self) -> ManifestMessage:
        """Return the manifest of all buckets sent so far in this update."""
        return self._require_packer().manifest()

    def abort(self) -> None:
        """Exhaust the stream without sending it."""
        if self._packer is not None:
            self._packer.exhaust()

    def close(self) -> None:
        """Release the shared memory."""
        for writer in self._writers:
            writer.close()

    def _require_packer(self) -> _FullPacker | _DeltaPacker:
        assert self._packer is not None, "call begin() or begin_delta() first"
        return self._packer


class _Packer(ABC, Generic[Item]):
    """Packs the items of one stream into buckets."""

    def __init__(self, stream: Iterable[Item | None]):
        self.num_buckets = 0
        self._stream = iter(stream)
        self._waiting: Item | None = None

    def fill(self, writer: BucketWriter) -> bool:
        """Fill an empty bucket from the stream, and return whether the stream ended."""
        if self._waiting is not None:
            self._add(writer, self._waiting)
            self._waiting = None
        for item in self._stream:
            if item is None:
                if not writer.empty:
                    return False
            elif not self._add(writer, item):
                self._waiting = item
                return False
        return True

    def exhaust(self) -> None:
        """Iterate the rest of the stream."""
        for _ in self._stream:
            pass

    @abstractmethod
    def _add(self, writer: BucketWriter, item: Item) -> bool:
        """Add an item to the bucket; return False if it belongs in the next bucket."""


class _FullPacker(_Packer[tuple[str, torch.Tensor]]):
    """Packs checkpoint tensors, each of them undivided."""

    def __init__(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]):
        super().__init__(named_tensors)
        self._manifest = Manifest(version)
        self.nbytes = 0

    def _add(self, writer: BucketWriter, item: tuple[str, torch.Tensor]) -> bool:
        if not writer.add(*item):
            return False
        self._manifest.add(TensorSpec.of(*item))
        self.nbytes += item[1].nbytes
        return True

    def seal(self, writer: BucketWriter, *, last: bool) -> Bucket:
        self.num_buckets += 1
        self._manifest.num_buckets = self.num_buckets
        return writer.seal(version=self._manifest.version, index=self.num_buckets - 1, last=last)

    def manifest(self) -> FullManifest:
        return self._manifest.to_message()


class _DeltaPacker(_Packer[PackedBlock]):
    """Packs delta blocks, several of them in a bucket."""

    def __init__(self, version: int, base: int, blocks: Iterable[PackedBlock | None]):
        super().__init__(blocks)
        self._version, self._base = version, base
        self._num_chunks = self._num_values = 0
        self._chunks: list[DeltaChunk] = []

    def _add(self, writer: BucketWriter, item: PackedBlock) -> bool:
        chunks, data = item
        offset = writer.add_bytes(data)
        if offset is None:
            return False
        self._chunks += [chunk.moved(offset) for chunk in chunks]
        return True

    def seal(self, writer: BucketWriter, *, last: bool) -> DeltaBucket:
        chunks, self._chunks = self._chunks, []
        self.num_buckets += 1
        self._num_chunks += len(chunks)
        self._num_values += sum(chunk.count for chunk in chunks)
        sealed = writer.seal(version=self._version, index=self.num_buckets - 1, last=last)
        return {**sealed, "base": self._base, "chunks": [chunk.to_message() for chunk in chunks]}

    def manifest(self) -> DeltaManifest:
        return {
            "version": self._version,
            "base": self._base,
            "num_buckets": self.num_buckets,
            "num_chunks": self._num_chunks,
            "num_values": self._num_values,
        }
