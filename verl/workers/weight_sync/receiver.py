"""The engine's end of a weight update: one receiver per worker process that holds a part of the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.weight_sync.bucket import check_bytes, read_bucket
from verl.workers.weight_sync.delta import DeltaChunk, decode
from verl.workers.weight_sync.delta_checks import check_bucket_base, check_chunk_spec, check_engine_base, check_totals
from verl.workers.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_received, dtype_name
from verl.workers.weight_sync.messages import (
    Bucket,
    BucketReport,
    EngineReport,
    ManifestMessage,
)
from verl.workers.weight_sync.shm import SegmentReader


class DeltaSession(Protocol):
    """Changes single elements of the engine's weights in place."""

    @property
    def accepted(self) -> bool:
        """Whether a full load has shown the position of every element."""

    def begin(self) -> None:
        """Prepare for a delta; an error if the positions are unknown or have changed."""

    def apply_chunk(self, name: str, indices: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Change elements of a checkpoint tensor.

        Args:
            indices: int64 [count], ascending, in the flattened tensor; None for contiguous elements from `start`.
            values: [count], in the tensor's dtype.
        """

    def refresh_derived(self) -> None:
        """Compute again what is derived from the changed weights, after each bucket."""

    def finish(self) -> None:
        """Complete the delta after its last bucket."""


class LoadSession(Protocol):
    """Loads full updates into the engine: to the checkpoint layout, load, to the kernel layout."""

    @property
    def delta(self) -> DeltaSession: ...

    def begin(self) -> None:
        """Bring the weights to the checkpoint layout."""

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Mapping[str, torch.dtype | None]:
        """Load tensors. They are views into memory that is overwritten later, so the session must not keep them.

        Returns:
            The tensors that the engine read: name -> dtype in which it holds the tensor, None if that is not known.
        """

    def unwritten(self) -> list[str]:
        """Return the engine's parameters that this session has not written completely; called before `finish`."""

    def finish(self) -> None:
        """Bring the weights to the kernel layout."""


class WeightReceiver:
    """Loads buckets in order, and commits a version only if everything was received and everything was written.

    After any error the receiver is out of service (`version` is None) until a full update succeeds.

    Args:
        session: the engine's loading functions.
        quantization: scheme of the rollout, if any; it checks the tensors before they are loaded.
        encodes: weights arrive unquantized and are encoded here; deltas are refused.

    Attributes:
        version: the version that is served; None during an update and after an error.
    """

    def __init__(self, session: LoadSession, quantization: QuantizationScheme | None = None, *, encodes: bool = False):
        assert quantization is not None or not encodes
        self._session = session
        self._quantization = quantization
        self._encodes = encodes
        self._reader = SegmentReader()
        self._open: _FullUpdate | _DeltaUpdate | None = None
        # The tensors that the engine was given by the last full update.
        self._specs: dict[str, TensorSpec] = {}
        self.version: int | None = None

    def begin(self, version: int, base: int | None = None) -> None:
        """Start to load `version`; the present version is no longer served.

        Args:
            base: the version that a delta is relative to; None for a full update.

        Raises:
            WeightUpdateError: the engine does not serve `base`, or accepts no deltas.
        """
        serving, self.version, self._open = self.version, None, None
        self._reader.drop_ended()
        if base is None:
            self._open = _FullUpdate(version, self._session, self._quantization, self._encodes)
        else:
            check_engine_base(serving, base, encodes=self._encodes)
            self._open = _DeltaUpdate(version, base, self._session.delta, self._quantization, self._specs)

    def load_bucket(self, bucket: Bucket) -> BucketReport:
        """Load a bucket of a full update or of a delta.

        Returns:
            The tensors that this worker did not read, which another one of the same engine may have read, and those
            that it holds in another dtype.

        Raises:
            WeightUpdateError: the bucket is out of order, of another version or incomplete, has a duplicate name, or
                other bytes than the sender wrote.
        """
        update = self._pop_open()
        started = time.perf_counter()
        version, index = int(bucket["version"]), int(bucket["index"])
        if version != update.version or index != update.num_buckets or update.last_seen:
            raise WeightUpdateError(
                f"received bucket {index} of version {version}, expected bucket {update.num_buckets} of version "
                f"{update.version}" + (" (the last bucket was received already)" if update.last_seen else "")
            )
        memory = self._reader.open(bucket["segment"]) if bucket["segment"] else torch.empty(0, dtype=torch.uint8)
        report = update.load(memory, bucket)
        check_bytes(memory, bucket)
        update.num_buckets += 1
        update.last_seen = bool(bucket["last"])
        update.load_s += time.perf_counter() - started
        self._open = update
        return report

    def finish(self, manifest: ManifestMessage) -> EngineReport:
        """Check the update against the sender's manifest, bring the weights to the kernel layout, and commit.

        Raises:
            WeightUpdateError: the update is incomplete; the message names a parameter.
        """
        update = self._pop_open()
        started = time.perf_counter()
        update.finish(manifest)
        self._specs, self.version = update.loaded, update.version
        finish_s = time.perf_counter() - started
        report = (self._quantization.pop_report() if self._quantization is not None else EncodeReport()).to_message()
        return {
            "load": update.load_s,
            "finish": finish_s,
            "encode": report["seconds"],
            "bytes": float(update.nbytes),
            "errors": report["errors"],
            "accepts_delta": self._session.delta.accepted and not self._encodes,
        }

    def _pop_open(self) -> _FullUpdate | _DeltaUpdate:
        """Return the open update and close it, so that an error leaves it closed: only another update can fix it."""
        update, self._open = self._open, None
        if update is None:
            raise WeightUpdateError("no weight update is open: call begin first")
        return update


class _Update:
    """The state of an update while its buckets are received."""

    def __init__(self, version: int):
        self.version = version
        self.num_buckets = 0
        self.last_seen = False
        self.nbytes = 0
        self.load_s = 0.0


class _FullUpdate(_Update):
    """Loads every weight, through the checkpoint layout."""

    def __init__(self, version: int, session: LoadSession, quantization: QuantizationScheme | None, encodes: bool):
        super().__init__(version)
        self._session, self._quantization, self._encodes = session, quantization, encodes
        self._received = Manifest(version)
        # The tensors that the engine is given: the received ones, or their encoded form.
        self.loaded: dict[str, TensorSpec] = {}
        if quantization is not None:
            quantization.pop_report()  # left by a failed update
        session.begin()

    def load(self, memory: torch.Tensor, bucket: Bucket) -> BucketReport:
        tensors = read_bucket(memory, bucket)
        for name, tensor in tensors:
            self._received.add(TensorSpec.of(name, tensor))
        if self._encodes:
            assert self._quantization is not None
            tensors = list(self._quantization.encode(tensors))
        for name, tensor in tensors:
            self.loaded[name] = TensorSpec.of(name, tensor)
            if self._quantization is not None:
                self._quantization.check_tensor(name, tensor, self.loaded)
        held = self._session.load(tensors)
        return {
            "unused": [name for name, _ in tensors if name not in held],
            "dtypes": {
                name: dtype_name(dtype)
                for name, tensor in tensors
                if (dtype := held.get(name)) is not None and _rounds(tensor.dtype, dtype)
            },
        }

    def finish(self, manifest: ManifestMessage) -> None:
        self._received.num_buckets, self.nbytes = self.num_buckets, self._received.nbytes
        check_received(Manifest.from_message(manifest), self._received)
        if self._quantization is not None:
            self._quantization.check_complete(self.loaded)
        unwritten = self._session.unwritten()
        if unwritten:
            raise WeightUpdateError(
                f"version {self.version}: {len(unwritten)} parameters of the engine were not written, the first is "
                f"{unwritten[0]!r}: trainer and engine use different checkpoint names"
            )
        self._session.finish()


def _rounds(sent: torch.dtype, held: torch.dtype) -> bool:
    """Return whether an engine that holds a tensor in `held` needs it in that dtype; encoded weights are exempt."""
    return sent != held and all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in (sent, held))


class _DeltaUpdate(_Update):
    """Changes the elements that differ from the version `base`, in place."""

    def __init__(
        self,
        version: int,
        base: int,
        session: DeltaSession,
        quantization: QuantizationScheme | None,
        specs: Mapping[str, TensorSpec],
    ):
        super().__init__(version)
        self._base, self._session, self._quantization, self.loaded = base, session, quantization, dict(specs)
        self._num_chunks = self._num_values = 0
        session.begin()

    def load(self, memory: torch.Tensor, bucket: Bucket) -> BucketReport:
        block = memory[: int(bucket["nbytes"])]
        for message in check_bucket_base(bucket, self._base)["chunks"]:
            chunk = DeltaChunk.from_message(message)
            check_chunk_spec(chunk, self.loaded)
            indices, values = decode(block, chunk)
            if self._quantization is not None:
                self._quantization.check_tensor(chunk.name, values, self.loaded)
            self._session.apply_chunk(chunk.name, indices, chunk.start, values)
            self._num_chunks += 1
            self._num_values += chunk.count
        self._session.refresh_derived()
        self.nbytes += block.numel()
        return {"unused": [], "dtypes": {}}

    def finish(self, manifest: ManifestMessage) -> None:
        check_totals(
            manifest,
            {
                "version": self.version,
                "base": self._base,
                "num_buckets": self.num_buckets,
                "num_chunks": self._num_chunks,
                "num_values": self._num_values,
            },
        )
        self._session.finish()
