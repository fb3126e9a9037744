"""One weight update from start to commit, seen from the driver.

    sender:    | begin | fill 0 | fill 1 | fill 2 |  ...  | manifest |
    receivers: | begin |        | load 0 | load 1 |  ...  | load n   | finish, check, commit |

Neither side waits for the other but for memory: the sender fills buckets while as many as are allowed in flight wait or
are being loaded, and it begins while the receivers still finish their last answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from verl.workers.weight_sync.encode_report import errors_by_depth, worst_error
from verl.workers.weight_sync.manifest import WeightUpdateError

logger = logging.getLogger(__name__)

# Of the bytes of a whole update: changes above it cost more to find, encode and place than sending everything does.
# On one host, where bytes are copied at the speed of memory, and across hosts (docs/performance.md, "Weight updates").
PAYS_ON_ONE_HOST, PAYS_ACROSS_HOSTS = 1 / 32, 1 / 4
# Updates after one that did not pay, until changes are tried again.
_UNTIL_TRIED_AGAIN = 16


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


class WeightUpdater:
    """Every update of a run: what changed where that is known to be enough, everything where it is not.

    Args:
        delta: send what changed, to engines that can take it.
        pays_below: the share of a whole update's bytes above which a delta is followed by whole updates for a while.
        check_interval: after so many deltas in a row the engines' parameters are compared with those that a whole
            update leaves, and are right afterwards in any case; 0 for never.
        buckets_in_flight: buckets in memory at a time.
    """

    def __init__(
        self, *, delta: bool, pays_below: float = float("inf"), check_interval: int = 0, buckets_in_flight: int = 2
    ):
        self._delta, self._pays_below = delta, pays_below
        self._check_interval, self._in_flight = check_interval, buckets_in_flight
        self._base: int | None = None
        self._unchecked = self._whole_ones_left = 0

    async def update(self, sender: Sender, receivers: Sequence[Receiver], version: int) -> dict[str, Any]:
        """Bring every receiver to `version`, or none; metrics as `update_weights` and:

        `weight_update/delta`: 1 where only changes were sent; `weight_update/delta_refused`: 1 where changes alone
        were no good and everything was sent after all; `weight_update/delta_mismatches`, where a check was due:
        parameters of the engines that were wrong before it.
        """
        base, self._base = self._base, None
        metrics: dict[str, Any] = {}
        if base is not None:
            try:
                metrics, patchable = await self._send(sender, receivers, version, base)
            except WeightUpdateError as error:
                logger.warning("%s; everything is sent instead", error)
                metrics, base = {"weight_update/delta_refused": 1.0}, None
            else:
                self._unchecked += 1
                self._judge(metrics["weight_update/MiB"] / metrics["weight_update/full_MiB"])
                if self._check_interval and self._unchecked >= self._check_interval:
                    metrics |= await self._check(sender, receivers, version)
        if base is None:
            whole, patchable = await self._send(sender, receivers, version, None)
            metrics |= whole
            self._unchecked = 0
            self._whole_ones_left = max(0, self._whole_ones_left - 1)
        if self._delta and patchable and not self._whole_ones_left:
            self._base = version
        return metrics

    def _judge(self, share: float) -> None:
        if share > self._pays_below:
            self._whole_ones_left = _UNTIL_TRIED_AGAIN
            logger.info(
                "what changed took %.1f%% of a whole update's bytes: the next %d updates send everything "
                "(actor_rollout_ref.rollout.checkpoint_engine.delta=on for changes all the same)",
                100 * share,
                _UNTIL_TRIED_AGAIN,
            )

    async def _send(
        self, sender: Sender, receivers: Sequence[Receiver], version: int, base: int | None
    ) -> tuple[dict[str, Any], bool]:
        return await update_weights(sender, receivers, version, base=base, buckets_in_flight=self._in_flight)

    async def _check(self, sender: Sender, receivers: Sequence[Receiver], version: int) -> dict[str, Any]:
        """Send everything, and count the parameters that it changes though `version` is there already."""
        started = time.perf_counter()
        before = await _all([receiver.parameter_hashes() for receiver in receivers])
        await self._send(sender, receivers, version, None)
        after = await _all([receiver.parameter_hashes() for receiver in receivers])
        self._unchecked = 0
        wrong = [
            name
            for replicas in zip(before, after, strict=True)
            for old, new in zip(*replicas, strict=True)
            for name in new
            if old.get(name) != new[name]
        ]
        if wrong:
            logger.error(
                "version %d: %d parameters of the engines differed from a whole update's, the first is %s; they are "
                "right now. What was generated since the last check may come from wrong weights",
                version,
                len(wrong),
                wrong[0],
            )
        return {
            "weight_update/delta_mismatches": float(len(wrong)),
            "weight_update/check_s": time.perf_counter() - started,
        }


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
    return metrics, all(r["patchable"] for r in received)


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
