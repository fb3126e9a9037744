"""The engine's end of a weight update: one per worker process that holds a part of the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from verl.workers.rollout.weight_sync.bucket import read_bucket
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


class ArrivalChecks(Protocol):
    """What the rollout's quantisation demands of an update."""

    def check_arriving(self, name: str, tensor: torch.Tensor, arrived: Mapping[str, TensorSpec]) -> None:
        """Called before each tensor is loaded; `arrived` is what has come so far, this one included."""

    def check_complete(self, arrived: Mapping[str, TensorSpec]) -> None:
        """Called once everything has come."""


class WeightReceiver:
    """Loads buckets in order and commits a version only where everything arrived and everything was written.

    After any error the receiver is out of service (`version` is None) until a whole update succeeds.

    Args:
        session: the engine's loading hooks.
        checks: of the quantisation, if any.
    """

    def __init__(self, session: LoadSession, checks: ArrivalChecks | None = None):
        self._session = session
        self._checks = checks
        self._reader = SegmentReader()
        self._arrived: Manifest | None = None
        self.version: int | None = None

    def begin(self, version: int) -> None:
        """Start loading `version`; the version that was being served is given up from here on."""
        self.version = None
        self._arrived = Manifest(version)
        self._last_seen = False
        self._seconds = {"load": 0.0, "finish": 0.0}
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
            if self._checks is not None:
                self._checks.check_arriving(name, tensor, arrived.specs)
        self._session.load(tensors)
        arrived.num_buckets += 1
        self._last_seen = bool(bucket["last"])
        self._seconds["load"] += time.perf_counter() - started

    def finish(self, manifest: dict[str, Any]) -> dict[str, float]:
        """Check against the sender's manifest, bring the weights to the run-time layout, and commit.

        Returns:
            Seconds spent in `load` and `finish`, and `bytes` received.
        """
        arrived = self._loading()
        started = time.perf_counter()
        check_arrived(Manifest.from_plain(manifest), arrived)
        if self._checks is not None:
            self._checks.check_complete(arrived.specs)
        unwritten = self._session.unwritten()
        if unwritten:
            self._fail(
                f"version {arrived.version}: {len(unwritten)} parameters of the engine were not written, the first is "
                f"{unwritten[0]!r}: the checkpoint names of the trainer and of the engine differ"
            )
        self._session.finish()
        self._arrived, self.version = None, arrived.version
        self._seconds["finish"] = time.perf_counter() - started
        return {**self._seconds, "bytes": float(arrived.nbytes)}

    def _loading(self) -> Manifest:
        if self._arrived is None:
            raise WeightUpdateError("no weight update is open: begin first")
        return self._arrived

    def _fail(self, message: str) -> None:
        self._arrived = None
        raise WeightUpdateError(message)
