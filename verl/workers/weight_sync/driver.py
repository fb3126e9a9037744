"""One weight update from start to commit, seen from the driver.

    sender:    | begin | fill 0 | fill 1 | fill 2 |  ...  | manifest |
    receivers: | begin |        | load 0 | load 1 |  ...  | load n   | finish, check, commit |

Neither side waits for the other but for memory: the sender fills buckets while as many as are allowed in flight wait or
are being loaded, and it begins while the receivers still finish their last answers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from verl.utils.quantization.encode_report import errors_by_depth, worst_error
from verl.workers.weight_sync.manifest import WeightUpdateError


class Sender(Protocol):
    async def begin_export(self, version: int, base: int | None) -> None:
        """Start sending everything, or what changed since `base`; WeightUpdateError where that is not known."""

    async def next_bucket(self) -> dict[str, Any]: ...

    async def finish_export(self) -> dict[str, Any]:
        """`manifest`, `seconds` spent gathering, encoding and packing, of which `encode`; `errors` of what it encoded;
        `full_bytes` that everything would take."""

    async def abort_export(self) -> None:
        """Give an export up that was begun, wherever it is: the next one may begin afterwards."""


class Receiver(Protocol):
    async def begin_update(self, version: int, base: int | None) -> None: ...

    async def load_bucket(self, bucket: dict[str, Any]) -> None: ...

    async def finish_update(self, manifest: dict[str, Any]) -> dict[str, Any]: ...

    async def abort_update(self, reason: str) -> None: ...

    async def parameter_hashes(self) -> list[dict[str, str]]: ...


async def update_weights(
    sender: Sender,
    receivers: Sequence[Receiver],
    version: int,
    *,
    base: int | None = None,
    buckets_in_flight: int = 2,
) -> tuple[dict[str, Any], bool]:
    """Bring every receiver to `version`, or none: after an error all of them refuse to serve.

    Args:
        base: the version that all of them serve, to send only what changed since; None to send everything.
        buckets_in_flight: buckets that are filled, waiting or being loaded at a time.

    Returns:
        Metrics `weight_update/`: seconds `begin_s` (to the load layout), `encode_s` (quantizing), `send_s` (gathering
        and packing), `load_s`, `finish_s` (to the run-time layout) and `total_s`; `MiB`, of `full_MiB` that everything
        takes, in `buckets`; `delta`; where something was quantized `max_quantization_error`, the largest relative
        error of a weight, `max_quantization_error_layer`, and `quantization_errors`, as `errors_by_depth`. And whether
        all can take changes to this version.

    Raises:
        WeightUpdateError: anything went wrong, with the cause's own words.
    """
    started = time.perf_counter()
    filled: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    free = asyncio.Semaphore(buckets_in_flight)

    async def fill() -> dict[str, Any]:
        await sender.begin_export(version, base)
        while True:
            await free.acquire()
            bucket = await sender.next_bucket()
            filled.put_nowait(bucket)
            if bucket["last"]:
                return await sender.finish_export()

    async def load() -> float:
        await _all([receiver.begin_update(version, base) for receiver in receivers])
        begun = time.perf_counter() - started
        while True:
            bucket = await filled.get()
            await _all([receiver.load_bucket(bucket) for receiver in receivers])
            free.release()
            if bucket["last"]:
                return begun

    try:
        export, begun = await _both(fill(), load())
        received = await _all([receiver.finish_update(export["manifest"]) for receiver in receivers])
    except BaseException as error:
        reason = f"the update to version {version} failed: {error}"
        aborts = [sender.abort_export(), *(receiver.abort_update(reason) for receiver in receivers)]
        await asyncio.gather(*aborts, return_exceptions=True)
        if isinstance(error, Exception):
            raise WeightUpdateError(reason) from error
        raise
    metrics = _metrics(export, received, begun, time.perf_counter() - started)
    metrics["weight_update/delta"] = float(base is not None)
    return metrics, all(r["accepts_delta"] for r in received)


def _metrics(
    export: dict[str, Any], received: Sequence[dict[str, Any]], begun: float, seconds: float
) -> dict[str, Any]:
    metrics = {
        "weight_update/begin_s": begun,
        "weight_update/encode_s": export["encode"] + max(r["encode"] for r in received),
        "weight_update/send_s": export["seconds"] - export["encode"],
        "weight_update/load_s": max(r["load"] - r["encode"] for r in received),
        "weight_update/finish_s": max(r["finish"] for r in received),
        "weight_update/total_s": seconds,
        "weight_update/MiB": max(r["bytes"] for r in received) / 2**20,
        "weight_update/full_MiB": export["full_bytes"] / 2**20,
        "weight_update/buckets": float(export["manifest"]["num_buckets"]),
    }
    # Replicas that encode all encode the same.
    errors = next((part["errors"] for part in (export, *received) if part["errors"]), {})
    worst = worst_error(errors)
    if worst is not None:
        error, layer = worst
        metrics |= {
            "weight_update/quantization_errors": errors_by_depth(errors),
            "weight_update/max_quantization_error": error,
            "weight_update/max_quantization_error_layer": layer,
        }
    return metrics


async def _both(first: Coroutine[Any, Any, Any], second: Coroutine[Any, Any, Any]) -> tuple[Any, Any]:
    """Wait for two at the same time; where one fails the other is cancelled."""
    tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _all(calls: Sequence[Any]) -> list[Any]:
    """Wait for every call, then raise the first error: none is left running in the background."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
