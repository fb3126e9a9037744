"""All weight updates of a run: a delta if it is small and accepted, a full update otherwise.

Every reason to refuse a delta is listed in `delta_checks`. After a refused delta the same version is sent as a full
update at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from verl.utils.asyncio_utils import gather_all
from verl.workers.weight_sync.driver import Metrics, Receiver, Sender, UpdateResult, update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError

logger = logging.getLogger(__name__)

# A delta pays off below this fraction of a full update's bytes: a larger one costs more to find, encode and apply than
# a full update. On one host, where bytes are copied at the speed of memory, and across hosts (docs/performance.md,
# "Weight updates").
PAYS_ON_ONE_HOST, PAYS_ACROSS_HOSTS = 1 / 32, 1 / 4
# Full updates after a delta that did not pay off, before the next delta is tried.
_FULL_UPDATES_BEFORE_RETRY = 16


class WeightUpdater:
    """Chooses between a delta and a full update for each version.

    Args:
        delta: send deltas to engines that accept them.
        pays_below: fraction of a full update's bytes above which a delta is followed by full updates for a while.
        check_interval: number of consecutive deltas after which the engines' parameters are compared with those of a
            full update, and corrected by it; 0 for never.
        buckets_in_flight: number of buckets in memory at the same time.
    """

    def __init__(
        self, *, delta: bool, pays_below: float = float("inf"), check_interval: int = 0, buckets_in_flight: int = 2
    ):
        self._delta, self._pays_below = delta, pays_below
        self._check_interval, self._buckets_in_flight = check_interval, buckets_in_flight
        self._base: int | None = None
        self._unchecked_deltas = self._full_updates_left = 0

    async def update(self, sender: Sender, receivers: Sequence[Receiver], version: int) -> Metrics:
        """Bring every receiver to `version`, or none.

        Returns:
            The metrics of `update_weights`; `weight_update/delta_refused`: 1 if a delta was refused and a full update
            was sent instead; after a check `weight_update/delta_mismatches`, the number of engine parameters that were
            wrong before it, and `weight_update/check_s`.
        """
        base, self._base = self._base, None
        metrics: Metrics = {}
        if base is not None:
            try:
                result = await self._send(sender, receivers, version, base)
            except WeightUpdateError as error:
                logger.warning("%s; sending a full update instead", error)
                metrics, base = {"weight_update/delta_refused": 1.0}, None
            else:
                metrics = dict(result.metrics)
                self._unchecked_deltas += 1
                self._evaluate_size(result.sent_bytes / result.full_bytes)
                if self._check_interval and self._unchecked_deltas >= self._check_interval:
                    metrics |= await self._check(sender, receivers, version)
        if base is None:
            result = await self._send(sender, receivers, version, None)
            metrics |= result.metrics
            self._unchecked_deltas = 0
            self._full_updates_left = max(0, self._full_updates_left - 1)
        if self._delta and result.accepts_delta and not self._full_updates_left:
            self._base = version
        return metrics

    async def restore(self, sender: Sender, receivers: Sequence[Receiver], version: int) -> Metrics:
        """Bring some receivers, which have no weights yet, to `version`, or none. The next update is a full one."""
        self._base = None
        return (await self._send(sender, receivers, version, None)).metrics

    def _evaluate_size(self, share: float) -> None:
        """Schedule full updates if a delta did not pay off."""
        if share > self._pays_below:
            self._full_updates_left = _FULL_UPDATES_BEFORE_RETRY
            logger.info(
                "the delta took %.1f%% of a full update's bytes: the next %d updates are full updates "
                "(set actor_rollout_ref.rollout.checkpoint_engine.delta=on to send deltas of any size)",
                100 * share,
                _FULL_UPDATES_BEFORE_RETRY,
            )

    async def _send(
        self, sender: Sender, receivers: Sequence[Receiver], version: int, base: int | None
    ) -> UpdateResult:
        return await update_weights(sender, receivers, version, base=base, buckets_in_flight=self._buckets_in_flight)

    async def _check(self, sender: Sender, receivers: Sequence[Receiver], version: int) -> Metrics:
        """Send a full update of `version`, which is served already, and count the parameters that it changes."""
        started = time.perf_counter()
        before = await gather_all(*(receiver.parameter_hashes() for receiver in receivers))
        await self._send(sender, receivers, version, None)
        after = await gather_all(*(receiver.parameter_hashes() for receiver in receivers))
        self._unchecked_deltas = 0
        wrong = [
            name
            for replicas in zip(before, after, strict=True)
            for old, new in zip(*replicas, strict=True)
            for name in new
            if old.get(name) != new[name]
        ]
        if wrong:
            logger.error(
                "version %d: %d engine parameters differed from those of a full update, the first is %s. The full "
                "update corrected them. Samples generated since the last check may come from wrong weights",
                version,
                len(wrong),
                wrong[0],
            )
        return {
            "weight_update/delta_mismatches": float(len(wrong)),
            "weight_update/check_s": time.perf_counter() - started,
        }
