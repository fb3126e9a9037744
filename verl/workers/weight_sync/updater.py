"""Every weight update of a run: a delta if it is small enough and accepted, a full update otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from verl.workers.weight_sync.driver import Receiver, Sender, _all, update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError

logger = logging.getLogger(__name__)

# Of the bytes of a whole update: changes above it cost more to find, encode and place than sending everything does.
# On one host, where bytes are copied at the speed of memory, and across hosts (docs/performance.md, "Weight updates").
PAYS_ON_ONE_HOST, PAYS_ACROSS_HOSTS = 1 / 32, 1 / 4
# Updates after one that did not pay, until changes are tried again.
_UNTIL_TRIED_AGAIN = 16


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
                metrics, accepts_delta = await self._send(sender, receivers, version, base)
            except WeightUpdateError as error:
                logger.warning("%s; everything is sent instead", error)
                metrics, base = {"weight_update/delta_refused": 1.0}, None
            else:
                self._unchecked += 1
                self._judge(metrics["weight_update/MiB"] / metrics["weight_update/full_MiB"])
                if self._check_interval and self._unchecked >= self._check_interval:
                    metrics |= await self._check(sender, receivers, version)
        if base is None:
            whole, accepts_delta = await self._send(sender, receivers, version, None)
            metrics |= whole
            self._unchecked = 0
            self._whole_ones_left = max(0, self._whole_ones_left - 1)
        if self._delta and accepts_delta and not self._whole_ones_left:
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
