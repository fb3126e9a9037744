"""The engine's end of a weight update: one per worker process that holds a part of the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from verl.workers.rollout.weight_sync.bucket import read_bucket
from verl.workers.rollout.weight_sync.encode_report import EncodeReport, worst_error
from verl.workers.rollout.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_arrived
from verl.workers.rollout.weight_sync.shm import SegmentReader


class LoadSession(Protocol):
    """How the engine takes weights: back to the load layout, load, on to the run-time layout."""

    def begin(self) -> None: ...

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load tensors. They are views into memory that is overwritten later: nothing may keep them."""

    def unwritten(self) -> list[str]:
        """Parameters of the engine that this session has not written in full; called before `finish`."""

    def finish(self) -> None: ...


class Quantisation(Protocol):
    """What the rollout's quantisation demands of an update, and adds to it."""

    def encode(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
        """Turn weights that came unquantised into what the engine takes."""

    def check_arriving(self, name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        """Called before each tensor is loaded; `arrived` is what has come so far, this one included."""

    def check_complete(self, arrived: Mapping[str, TensorSpec]) -> None:
        """Called once everything has come."""

    def take_report(self) -> EncodeReport:
        """What `encode` did since the last call."""


class WeightReceiver:
    """Loads buckets in order and commits a version only where everything arrived and everything was written.

    After any error the receiver is out of service (`version` is None) until a whole update succeeds.

    Args:
        session: the engine's loading hooks.
        quantisation: of the rollout, if any; its checks see what is loaded.
        encodes: weights come unquantised, and are encoded here.
    """

    def __init__(self, session: LoadSession, quantisation: Quantisation | None = None, *, encodes: bool = False):
        assert quantisation is not None or not encodes
        self._session = session
        self._quantisation = quantisation
        self._encodes = encodes
        self._reader = SegmentReader()
        self._arrived: Manifest | None = None
        self.version: int | None = None

    def begin(self, version: int) -> None:
        """Start loading `version`; the version that was being served is given up from here on."""
        self.version = None
        self._arrived = Manifest(version)
        # What the engine is given: the same tensors, or the encoded ones.
        self._loaded: dict[str, TensorSpec] = {}
        self._last_seen = False
        self._seconds = {"load": 0.0, "finish": 0.0}
        if self._quantisation is not None:
            self._quantisation.take_report()  # what an update that failed left behind
        self._session.begin()

    def load_bucket(self, bucket: dict[str, Any]) -> None:
        """Load one bucket (a plain dict from `BucketWriter.seal`).

        Raises:
            WeightUpdateError: out of order, of another version, cut short, or naming a parameter twice.
        """
        arrived = self._loading()
        started = time.perf_counter()
        version, index = int(bucket["version"]), int(bucket["index"])
        if version != arrived.version or index != arrived.num_buckets or self._last_seen:
            self._fail(
                f"bucket {index} of version {version} arrived where bucket {arrived.num_buckets} of version "
                f"{arrived.version} was due" + (" (the last bucket had been seen)" if self._last_seen else "")
            )
        memory = self._reader.open(bucket["segment"]) if bucket["segment"] else torch.empty(0, dtype=torch.uint8)
        tensors = read_bucket(memory, bucket)
        for name, tensor in tensors:
            arrived.add(TensorSpec.of(name, tensor))
        if self._quantisation is not None:
            tensors = list(self._quantisation.encode(tensors)) if self._encodes else tensors
            for name, tensor in tensors:
                self._loaded[name] = TensorSpec.of(name, tensor)
                self._quantisation.check_arriving(name, tensor, self._loaded)
        self._session.load(tensors)
        arrived.num_buckets += 1
        self._last_seen = bool(bucket["last"])
        self._seconds["load"] += time.perf_counter() - started

    def finish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Check against the sender's manifest, bring the weights to the run-time layout, and commit.

        Returns:
            Seconds spent in `load`, of which `encode`, and in `finish`; `bytes` received; the `worst` error of a weight
            that was encoded here, as (relative error, name), or None.
        """
        arrived = self._loading()
        started = time.perf_counter()
        check_arrived(Manifest.from_plain(manifest), arrived)
        if self._quantisation is not None:
            self._quantisation.check_complete(self._loaded)
        unwritten = self._session.unwritten()
        if unwritten:
            self._fail(
                f"version {arrived.version}: {len(unwritten)} parameters of the engine were not written, the first is "
                f"{unwritten[0]!r}: the checkpoint names of the trainer and of the engine differ"
            )
        self._session.finish()
        self._arrived, self.version = None, arrived.version
        self._seconds["finish"] = time.perf_counter() - started
        report = self._quantisation.take_report() if self._quantisation is not None else EncodeReport()
        return {
            **self._seconds,
            "encode": report.seconds,
            "bytes": float(arrived.nbytes),
            "worst": worst_error([report.to_plain()]),
        }

    def _loading(self) -> Manifest:
        if self._arrived is None:
            raise WeightUpdateError("no weight update is open: begin first")
        return self._arrived

    def _fail(self, message: str) -> None:
        self._arrived = None
        raise WeightUpdateError(message)
