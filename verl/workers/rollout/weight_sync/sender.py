"""The trainer's end of a weight update: turns a stream of named tensors into buckets.

Every rank of the trainer iterates the stream, because gathering a shard is collective. One of them packs it with a
`WeightSender`; the others just exhaust theirs, held in step by the collectives.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from verl.workers.rollout.weight_sync.bucket import BucketWriter, align
from verl.workers.rollout.weight_sync.manifest import Manifest, TensorSpec

# Enough of them that little of the loading is left when the last one is filled; each costs a round of calls.
_OVERLAPPING_BUCKETS = 6
_SMALLEST_BUCKET = 8 << 20


class WeightSender:
    """Packs an export into buckets, two of them in memory at a time.

    Bucket `k` stays valid until bucket `k + 2` is asked for, so the receiver may load one while the next is filled. A
    model that would fit into one bucket is sent in several smaller ones, once its size is known from the first update.

    Args:
        bucket_bytes: size of a bucket in bytes, at most.
    """

    def __init__(self, bucket_bytes: int):
        if bucket_bytes <= 0:
            raise ValueError(f"bucket size of {bucket_bytes} bytes: must be positive")
        self._bucket_bytes = bucket_bytes
        self._writers = [BucketWriter(bucket_bytes), BucketWriter(bucket_bytes)]
        self._manifest: Manifest | None = None
        self._stream: Iterator[tuple[str, torch.Tensor]] | None = None

    def begin(self, version: int, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Start an update; one that was not finished is forgotten."""
        if self._manifest is not None:
            share = max(self._manifest.nbytes // _OVERLAPPING_BUCKETS, _SMALLEST_BUCKET)
            for writer in self._writers:
                writer.capacity = align(min(self._bucket_bytes, share))
        self._manifest = Manifest(version)
        self._stream = iter(named_tensors)
        self._waiting: tuple[str, torch.Tensor] | None = None
        self.seconds = 0.0

    @torch.no_grad()
    def next_bucket(self) -> dict[str, Any]:
        """Fill the next bucket and describe it; `last` is true on the final one."""
        assert self._stream is not None and self._manifest is not None, "begin() first"
        started = time.perf_counter()
        index = self._manifest.num_buckets
        writer = self._writers[index % 2]
        writer.reset()
        last = self._fill(writer)
        self._manifest.num_buckets += 1
        self.seconds += time.perf_counter() - started
        return writer.seal(version=self._manifest.version, index=index, last=last)

    def _fill(self, writer: BucketWriter) -> bool:
        """True where the stream ended with this bucket."""
        if self._waiting is not None:
            writer.add(*self._waiting)
            self._waiting = None
        assert self._stream is not None and self._manifest is not None
        for name, tensor in self._stream:
            self._manifest.add(TensorSpec.of(name, tensor))
            if not writer.add(name, tensor):
                self._waiting = (name, tensor)
                return False
        return True

    def manifest(self) -> dict[str, Any]:
        """What the whole update consisted of, in plain strings and numbers."""
        assert self._manifest is not None, "begin() first"
        return self._manifest.to_plain()

    @property
    def nbytes(self) -> int:
        """Bytes of everything sent so far."""
        assert self._manifest is not None, "begin() first"
        return self._manifest.nbytes

    def abort(self) -> None:
        """Exhaust the stream without sending it."""
        for _ in self._stream or ():
            pass
        self._stream = None

    def close(self) -> None:
        """Give the shared memory back."""
        for writer in self._writers:
            writer.close()
