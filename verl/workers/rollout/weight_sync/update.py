"""One weight update from start to commit, seen from the driver.

    sender:    | begin | fill 0 | fill 1 | fill 2 |  ...  | manifest |
    receivers: | begin |        | load 0 | load 1 |  ...  | load n   | finish, check, commit |

While the receivers load one bucket the sender fills the next; two buckets exist at a time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, Protocol

from verl.workers.rollout.weight_sync.manifest import WeightUpdateError


class Sender(Protocol):
    async def begin_export(self, version: int) -> None: ...

    async def next_bucket(self) -> dict[str, Any]: ...

    async def finish_export(self) -> dict[str, Any]:
        """`manifest`, `seconds` spent gathering, encoding and packing, of which `encode`; the `worst` error."""


class Receiver(Protocol):
    async def begin_update(self, version: int) -> None: ...

    async def load_bucket(self, bucket: dict[str, Any]) -> None: ...

    async def finish_update(self, manifest: dict[str, Any]) -> dict[str, Any]: ...

    async def abort_update(self, reason: str) -> None: ...


async def update_weights(sender: Sender, receivers: Sequence[Receiver], version: int) -> dict[str, Any]:
    """Bring every receiver to `version`, or none: after an error all of them refuse to serve.

    Returns:
        Metrics `weight_update/`: seconds `begin_s` (to the load layout), `encode_s` (quantising), `send_s` (gathering
        and packing), `load_s`, `finish_s` (to the run-time layout) and `total_s`; `MiB`, `buckets`; where something was
        quantised `max_quantization_error`, the largest relative error of a weight, and `max_quantization_error_layer`.

    Raises:
        WeightUpdateError: anything went wrong, with the cause's own words.
    """
    started = time.perf_counter()
    try:
        await _all([sender.begin_export(version), *(receiver.begin_update(version) for receiver in receivers)])
        begun = time.perf_counter() - started
        loading: asyncio.Future[Any] | None = None
        while True:
            bucket = await sender.next_bucket()
            if loading is not None:
                await loading
            loading = asyncio.ensure_future(_all([receiver.load_bucket(bucket) for receiver in receivers]))
            if bucket["last"]:
                break
        export, _ = await _all([sender.finish_export(), loading])
        received = await _all([receiver.finish_update(export["manifest"]) for receiver in receivers])
    except BaseException as error:
        reason = f"the update to version {version} failed: {error}"
        await asyncio.gather(*(receiver.abort_update(reason) for receiver in receivers), return_exceptions=True)
        if isinstance(error, Exception) and not isinstance(error, WeightUpdateError):
            raise WeightUpdateError(reason) from error
        raise
    return _metrics(export, received, begun, time.perf_counter() - started)


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
        "weight_update/buckets": float(export["manifest"]["num_buckets"]),
    }
    worst = [part["worst"] for part in (export, *received) if part["worst"] is not None]
    if worst:
        error, layer = max(worst)
        metrics |= {
            "weight_update/max_quantization_error": error,
            "weight_update/max_quantization_error_layer": layer,
        }
    return metrics


async def _all(calls: Sequence[Any]) -> list[Any]:
    """Wait for every call, then raise the first error: none is left running in the background."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
