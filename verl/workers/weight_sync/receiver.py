"""The engine's end of a weight update: one per worker process that holds a part of the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.quantization_scheme import QuantizationScheme
from verl.workers.weight_sync.bucket import read_bucket
from verl.workers.weight_sync.delta import DeltaChunk, decode
from verl.workers.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_received
from verl.workers.weight_sync.shm import SegmentReader


class LoadSession(Protocol):
    """How the engine takes weights: back to the load layout, load, on to the run-time layout."""

    def begin(self) -> None: ...

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors. They are views into memory that is overwritten later: nothing may keep them."""

    def unwritten(self) -> list[str]:
        """Parameters of the engine that this session has not written in full; called before `finish`."""

    def finish(self) -> None: ...

    @property
    def accepts_delta(self) -> bool:
        """Whether single elements can be changed in place, now that a whole load has shown where they are."""

    def begin_delta(self) -> None:
        """Before the first `patch`; raises where the layout is not known, or not as it was."""

    def patch(self, name: str, places: torch.Tensor | None, start: int, values: torch.Tensor) -> None:
        """Change elements of a checkpoint tensor: `places` of it flattened, or those from `start` on."""

    def refresh_derived(self) -> None:
        """After those of a bucket."""

    def finish_delta(self) -> None:
        """After the last `patch`."""


class WeightReceiver:
    """Loads buckets in order and commits a version only where everything arrived and everything was written.

    An update is whole, or a delta to the version that is being served. After any error the receiver is out of service
    (`version` is None) until a whole update succeeds.

    Args:
        session: the engine's loading hooks.
        quantization: of the rollout, if any; its checks see what is loaded.
        encodes: weights come unquantized, and are encoded here: deltas are refused.
    """

    def __init__(self, session: LoadSession, quantization: QuantizationScheme | None = None, *, encodes: bool = False):
        assert quantization is not None or not encodes
        self._session = session
        self._quantization = quantization
        self._encodes = encodes
        self._reader = SegmentReader()
        self._open: _Whole | _Delta | None = None
        # What the engine was given by the last whole update.
        self._specs: dict[str, TensorSpec] = {}
        self.version: int | None = None

    def begin(self, version: int, base: int | None = None) -> None:
        """Start loading `version`; the version that was being served is given up from here on.

        Args:
            base: the version that a delta is relative to; None for a whole update.

        Raises:
            WeightUpdateError: a delta to another version than the one served, or to an engine that cannot take any.
        """
        serving, self.version, self._open = self.version, None, None
        if base is None:
            self._open = _Whole(version, self._session, self._quantization, self._encodes)
        elif serving != base:
            has = "none" if serving is None else f"version {serving}"
            raise WeightUpdateError(f"a delta to version {base} arrived, the engine has {has}: send everything")
        elif self._encodes:
            raise WeightUpdateError("the engine quantizes what arrives, and cannot tell what a change amounts to")
        else:
            self._open = _Delta(version, base, self._session, self._quantization, self._specs)

    def load_bucket(self, bucket: dict[str, Any]) -> None:
        """Load one bucket (a plain dict from `BucketWriter.seal`; with `pieces`, what changed).

        Raises:
            WeightUpdateError: out of order, of another version, cut short, or naming a parameter twice.
        """
        update = self._take()
        started = time.perf_counter()
        version, index = int(bucket["version"]), int(bucket["index"])
        if version != update.version or index != update.num_buckets or update.last_seen:
            raise WeightUpdateError(
                f"bucket {index} of version {version} arrived where bucket {update.num_buckets} of version "
                f"{update.version} was due" + (" (the last bucket had been seen)" if update.last_seen else "")
            )
        memory = self._reader.open(bucket["segment"]) if bucket["segment"] else torch.empty(0, dtype=torch.uint8)
        update.load(memory, bucket)
        update.num_buckets += 1
        update.last_seen = bool(bucket["last"])
        update.seconds["load"] += time.perf_counter() - started
        self._open = update

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Check against the sender's manifest, bring the weights to the run-time layout, and commit.

        Returns:
            Seconds spent in `load`, of which `encode`, and in `finish`; `bytes` received; the `errors` of weights that
            were encoded here; `accepts_delta`: whether a delta may follow.
        """
        update = self._take()
        started = time.perf_counter()
        update.finish(manifest)
        self._specs, self.version = update.loaded, update.version
        update.seconds["finish"] = time.perf_counter() - started
        report = self._quantization.pop_report() if self._quantization is not None else EncodeReport()
        plain = report.to_message()
        return {
            **update.seconds,
            "encode": plain["seconds"],
            "bytes": float(update.nbytes),
            "errors": plain["errors"],
            "accepts_delta": self._session.accepts_delta and not self._encodes,
        }

    def _take(self) -> _Whole | _Delta:
        """The open update, which an error on the way closes: only another one can mend what it left."""
        update, self._open = self._open, None
        if update is None:
            raise WeightUpdateError("no weight update is open: begin first")
        return update


class _Update:
    """One update while it arrives."""

    def __init__(self, version: int):
        self.version = version
        self.num_buckets = 0
        self.last_seen = False
        self.nbytes = 0
        self.seconds = {"load": 0.0, "finish": 0.0}


class _Whole(_Update):
    """Every weight, through the load layout."""

    def __init__(self, version: int, session: LoadSession, quantization: QuantizationScheme | None, encodes: bool):
        super().__init__(version)
        self._session, self._quantization, self._encodes = session, quantization, encodes
        self._arrived = Manifest(version)
        # What the engine is given: the same tensors, or the encoded ones.
        self.loaded: dict[str, TensorSpec] = {}
        if quantization is not None:
            quantization.pop_report()  # what an update that failed left behind
        session.begin()

    def load(self, memory: torch.Tensor, bucket: dict[str, Any]) -> None:
        tensors = read_bucket(memory, bucket)
        for name, tensor in tensors:
            self._arrived.add(TensorSpec.of(name, tensor))
        if self._encodes:
            assert self._quantization is not None
            tensors = list(self._quantization.encode(tensors))
        for name, tensor in tensors:
            self.loaded[name] = TensorSpec.of(name, tensor)
            if self._quantization is not None:
                self._quantization.check_tensor(name, tensor, self.loaded)
        self._session.load(tensors)

    def finish(self, manifest: dict[str, Any]) -> None:
        self._arrived.num_buckets, self.nbytes = self.num_buckets, self._arrived.nbytes
        check_received(Manifest.from_message(manifest), self._arrived)
        if self._quantization is not None:
            self._quantization.check_complete(self.loaded)
        unwritten = self._session.unwritten()
        if unwritten:
            raise WeightUpdateError(
                f"version {self.version}: {len(unwritten)} parameters of the engine were not written, the first is "
                f"{unwritten[0]!r}: the checkpoint names of the trainer and of the engine differ"
            )
        self._session.finish()


class _Delta(_Update):
    """What changed since `base`, in place."""

    def __init__(
        self,
        version: int,
        base: int,
        session: LoadSession,
        quantization: QuantizationScheme | None,
        specs: Mapping[str, TensorSpec],
    ):
        super().__init__(version)
        self._base, self._session, self._quantization, self.loaded = base, session, quantization, dict(specs)
        self._pieces = self._values = 0
        session.begin_delta()

    def load(self, memory: torch.Tensor, bucket: dict[str, Any]) -> None:
        block = memory[: int(bucket["nbytes"])]
        if bucket.get("base") != self._base:
            raise WeightUpdateError(f"a bucket relative to version {bucket.get('base')}, where {self._base} was due")
        for plain in bucket["chunks"]:
            piece = DeltaChunk.from_message(plain)
            spec, sent = self.loaded.get(piece.name), TensorSpec(piece.name, piece.shape, piece.dtype)
            if spec != sent:
                known = "no such parameter" if spec is None else f"{spec.dtype}{list(spec.shape)}"
                raise WeightUpdateError(
                    f"parameter {piece.name!r}: a delta to {sent.dtype}{list(sent.shape)}, the engine was given {known}"
                )
            places, values = decode(block, piece)
            if self._quantization is not None:
                self._quantization.check_tensor(piece.name, values, self.loaded)
            self._session.patch(piece.name, places, piece.start, values)
            self._pieces += 1
            self._values += piece.count
        self._session.refresh_derived()
        self.nbytes += block.numel()

    def finish(self, manifest: dict[str, Any]) -> None:
        arrived = {
            "version": self.version,
            "base": self._base,
            "num_buckets": self.num_buckets,
            "num_chunks": self._pieces,
            "num_values": self._values,
        }
        for key, value in arrived.items():
            if manifest.get(key) != value:
                raise WeightUpdateError(
                    f"delta from version {self._base} to {self.version}: {key} is {manifest.get(key)} at the sender "
                    f"and {value} here"
                )
        self._session.finish_delta()
