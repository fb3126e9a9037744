"""One weight update, as the driver runs it: a transaction that brings every receiver to the new version, or none.

    step     sender (the trainer)          receivers (one per engine)
    -------  ----------------------------  ---------------------------------------------------------------------------
    pause                                  begin_update: finish or cut the requests in flight, let new requests wait
    begin    begin_export                  begin_update: bring the weights to the checkpoint layout, or prepare a delta
    buckets  next_bucket 0 ... n           load_bucket 0 ... n
    finish   finish_export -> manifest     finish_update(manifest)
    check                                  every sent tensor was used; finish_update: received = sent, and every engine
                                           parameter was written; then bring the weights to the kernel layout
    commit                                 finish_update: serve the version, reset the prefix cache, resume requests

    error    abort_export                  abort_update: refuse to serve until a full update succeeds

The first full update shows in which dtype an engine holds each tensor; a router's bias may be float32 in a bfloat16
model. If the sender used another dtype, it sends everything once more in the engine's dtypes before the commit.

The two sides overlap, and only memory makes one wait for the other: the sender fills buckets while at most
`buckets_in_flight` of them are filled, queued or being loaded.

    sender:    | begin | fill 0 | fill 1 | fill 2 |  ...  | finish |
    receivers: | pause, begin   | load 0 | load 1 |  ...  | load n  | finish, check, commit |
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from verl.utils.asyncio_utils import gather_all, gather_or_cancel
from verl.utils.quantization.encode_report import Errors, errors_by_depth, worst_error
from verl.workers.weight_sync.manifest import WeightUpdateError, check_used
from verl.workers.weight_sync.messages import Bucket, BucketReport, EngineReport, ExportReport, ManifestMessage

Metrics = dict[str, float | str | dict[str, list[float | None]]]


class Sender(Protocol):
    """The trainer's end of the update."""

    async def begin_export(self, version: int, base: int | None) -> None:
        """Start to send `version`: a delta against the version `base`, or a full update if it is None.

        Raises:
            WeightUpdateError: a delta against `base` cannot be built.
        """

    async def send_as(self, dtypes: Mapping[str, str]) -> None:
        """Send some tensors in other dtypes from the next full update on: checkpoint name -> dtype name."""

    async def next_bucket(self) -> Bucket:
        """Fill and describe the next bucket."""

    async def finish_export(self) -> ExportReport:
        """Keep the sent weights as the base of later deltas."""

    async def abort_export(self) -> None:
        """End the export at any point; the next export may begin afterwards."""


class Receiver(Protocol):
    """The end of the update in one engine."""

    async def begin_update(self, version: int, base: int | None) -> None:
        """Stop serving and prepare to load `version`: a delta against `base`, or a full update if it is None."""

    async def load_bucket(self, bucket: Bucket) -> BucketReport:
        """Load a bucket."""

    async def finish_update(self, manifest: ManifestMessage) -> EngineReport:
        """Check the update, bring the weights to the kernel layout, commit the version and serve it."""

    async def abort_update(self, reason: str) -> None:
        """Refuse to serve until a full update succeeds."""

    async def parameter_hashes(self) -> list[dict[str, str]]:
        """Return the SHA-256 of every parameter, by engine name, for each worker."""


@dataclass(frozen=True)
class UpdateResult:
    """The result of a weight update.

    Attributes:
        metrics: see `update_weights`.
        accepts_delta: every receiver can take a delta against this version.
        sent_bytes, full_bytes: bytes that were sent, and bytes of a full update.
    """

    metrics: Metrics
    accepts_delta: bool
    sent_bytes: float
    full_bytes: float


async def update_weights(
    sender: Sender,
    receivers: Sequence[Receiver],
    version: int,
    *,
    base: int | None = None,
    buckets_in_flight: int = 2,
) -> UpdateResult:
    """Bring every receiver to `version`, or none: after an error all of them refuse to serve.

    Args:
        base: send a delta against this version, which all receivers serve; None for a full update.
        buckets_in_flight: largest number of buckets that are filled, queued or being loaded at the same time.

    Returns:
        Metrics `weight_update/`: seconds `begin_s` (to the checkpoint layout), `encode_s` (quantizing), `send_s`
        (gathering and packing), `load_s`, `finish_s` (to the kernel layout) and `total_s`; `MiB` sent, `full_MiB` of a
        full update, number of `buckets`; `delta` (1 or 0). If weights were quantized also `max_quantization_error`, the
        largest relative error of a weight, `max_quantization_error_layer`, the name of that weight, and
        `quantization_errors`, the result of `errors_by_depth`.

    Raises:
        WeightUpdateError: any error of the sender or a receiver; the message contains its text.
    """
    started = time.perf_counter()
    try:
        export, begin_s, dtypes = await _transfer(sender, receivers, version, base, buckets_in_flight)
        if dtypes:
            # Loading has shown dtypes that the sender did not know. The engines have not committed anything.
            await sender.send_as(dtypes)
            export, begin_s, dtypes = await _transfer(sender, receivers, version, base, buckets_in_flight)
            if dtypes:
                raise WeightUpdateError(f"the engines hold tensors in dtypes that were not sent: {dtypes}")
        reports = await gather_all(*(receiver.finish_update(export["manifest"]) for receiver in receivers))
    except BaseException as error:
        reason = f"the update to version {version} failed: {error}"
        aborts = [sender.abort_export(), *(receiver.abort_update(reason) for receiver in receivers)]
        await asyncio.gather(*aborts, return_exceptions=True)
        if isinstance(error, Exception):
            raise WeightUpdateError(reason) from error
        raise
    metrics = _metrics(export, reports, begin_s, time.perf_counter() - started)
    metrics["weight_update/delta"] = float(base is not None)
    return UpdateResult(
        metrics,
        all(report["accepts_delta"] for report in reports),
        max(report["bytes"] for report in reports),
        export["full_bytes"],
    )


async def _transfer(
    sender: Sender, receivers: Sequence[Receiver], version: int, base: int | None, buckets_in_flight: int
) -> tuple[ExportReport, float, dict[str, str]]:
    """Send every bucket to every receiver.

    Returns:
        The sender's report, the seconds until all receivers had begun, and the tensors that an engine holds in another
        dtype than that in which they were sent: checkpoint name -> dtype name.

    Raises:
        WeightUpdateError: an engine did not use a tensor.
    """
    started = time.perf_counter()
    filled: asyncio.Queue[Bucket] = asyncio.Queue()
    free = asyncio.Semaphore(buckets_in_flight)

    async def fill() -> ExportReport:
        await sender.begin_export(version, base)
        while True:
            await free.acquire()
            bucket = await sender.next_bucket()
            filled.put_nowait(bucket)
            if bucket["last"]:
                return await sender.finish_export()

    async def load() -> tuple[float, dict[str, str]]:
        await gather_all(*(receiver.begin_update(version, base) for receiver in receivers))
        begin_s = time.perf_counter() - started
        unused: set[str] = set()
        dtypes: dict[str, str] = {}
        while True:
            bucket = await filled.get()
            for report in await gather_all(*(receiver.load_bucket(bucket) for receiver in receivers)):
                unused.update(report["unused"])
                dtypes |= report["dtypes"]
            free.release()
            if bucket["last"]:
                check_used(version, unused)
                return begin_s, dtypes

    export, (begin_s, dtypes) = await gather_or_cancel(fill(), load(), wait_for_cancelled=True)
    return export, begin_s, dtypes


def _metrics(export: ExportReport, reports: Sequence[EngineReport], begin_s: float, total_s: float) -> Metrics:
    metrics: Metrics = {
        "weight_update/begin_s": begin_s,
        "weight_update/encode_s": export["encode"] + max(report["encode"] for report in reports),
        "weight_update/send_s": export["seconds"] - export["encode"],
        "weight_update/load_s": max(report["load"] - report["encode"] for report in reports),
        "weight_update/finish_s": max(report["finish"] for report in reports),
        "weight_update/total_s": total_s,
        "weight_update/MiB": max(report["bytes"] for report in reports) / 2**20,
        "weight_update/full_MiB": export["full_bytes"] / 2**20,
        "weight_update/buckets": float(export["manifest"]["num_buckets"]),
    }
    # All replicas that quantize do so with the same weights, so the first report with errors stands for all.
    errors = next((found for found in (export["errors"], *(report["errors"] for report in reports)) if found), {})
    return metrics | _error_metrics(errors)


def _error_metrics(errors: Errors) -> Metrics:
    worst = worst_error(errors)
    if worst is None:
        return {}
    error, layer = worst
    return {
        "weight_update/quantization_errors": errors_by_depth(errors),
        "weight_update/max_quantization_error": error,
        "weight_update/max_quantization_error_layer": layer,
    }
