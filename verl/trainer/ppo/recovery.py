"""Restart of replicas that die or hang, while the run goes on.

    replica    | serves v | dies | killed, started again | full update | serves v |
    requests                     | other replicas, or wait if there is none ..... |
    trainer    | ................................. its turn: send ...... | ...

A restarted replica gets the trainer's weights in a turn of its own (`WorkerGroup.exclusive`). If they have changed
since version v was published and other replicas still serve v, it waits for the next update. If none serves, it gets
the changed weights at once, because the step may wait for its responses: they are those of the next version, which a
step with a single local update publishes unchanged.

An update that fails because a replica died is repeated with the others. They got a part of it and refuse to serve until
then, so no token comes from a mixture of two versions.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from verl.config.watchdog import WatchdogConfig
from verl.utils.asyncio_utils import cancel_and_wait
from verl.workers.rollout.replica import ReplicaSet, vLLMReplica
from verl.workers.rollout.types import ReplicaUnavailable
from verl.workers.weight_sync.manifest import WeightUpdateError

logger = logging.getLogger(__name__)

Lives = list[tuple[vLLMReplica, int]]  # replicas, each with the number of its start


class ReplicaFailed(RuntimeError):
    """A replica died once more than `rollout.max_restarts` allows."""


class Send(Protocol):
    """Sends the trainer's weights."""

    async def __call__(self, replicas: Sequence[vLLMReplica], version: int, *, restore: bool) -> dict[str, Any]:
        """Bring replicas to the trainer's weights as `version`, or none; return metrics.

        Args:
            restore: these replicas only were restarted, and have no weights yet.
        """


class ReplicaRecovery:
    """Watches the replicas, restarts dead ones, and brings them to the weights of the run.

    Args:
        replicas: running.
        max_restarts: restarts of each replica.
        watchdog: interval and limit of the health calls.
        send: sends the trainer's weights.
        exclusive: keeps the trainer ranks from any other work.
        shares_memory: the trainer needs the memory of sleeping replicas, so a dead one starts only after its turn.
        one_update_per_version: False if the trainer's weights change several times between two versions.

    Attributes:
        changes: see `verl.workers.rollout.replica.Recovery`.
        version: of the last update; None before the first one.
        restarts: by rank.
        write_stacks: writes the stacks of all processes before a replica that generates nothing is killed.
    """

    def __init__(
        self,
        replicas: ReplicaSet,
        *,
        max_restarts: int,
        watchdog: WatchdogConfig,
        send: Send,
        exclusive: Callable[[], AbstractAsyncContextManager[None]],
        shares_memory: bool,
        one_update_per_version: bool,
    ):
        self.replicas, self._max_restarts, self._watchdog = replicas, max_restarts, watchdog
        self._send, self._exclusive, self._shares_memory = send, exclusive, shares_memory
        self._one_update_per_version = one_update_per_version
        self.changes = 0
        self.version: int | None = None
        self.restarts: Counter[int] = Counter()
        self.write_stacks: Callable[[], Awaitable[None]] | None = None
        self._weights_changed = self._updating = False
        self._reasons: dict[int, str] = {}  # the first one of each replica
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._recovering: dict[int, asyncio.Task[None]] = {}
        self._checking: dict[int, asyncio.Task[None]] = {}
        # A task that a call in the trainer's turn creates must not take itself for a part of this turn.
        self._context = contextvars.copy_context()
        replicas.recovery = self
        for replica in replicas.replicas:
            replica.on_death = self._on_death
        self._monitor = self._task(self._watch()) if watchdog.enable else None

    # ---- for the run ----

    async def failure(self) -> None:
        """Wait for the end of the last allowed life of a replica, and raise it.

        Raises:
            ReplicaFailed: with the reasons of the first and the last death.
        """
        while self._error is None:
            await self._changed.wait()
        raise self._error

    def on_training(self) -> None:
        """Note that the trainer's weights are about to change."""
        self._weights_changed = True

    async def update(self, version: int) -> dict[str, Any]:
        """Bring every live replica to the trainer's weights as `version`; return the metrics of the update.

        Raises:
            WeightUpdateError: the update failed, and not because a replica died.
            ReplicaFailed: no replica is left, and no restart.
        """
        async with self._exclusive():
            self._updating, self.replicas.asleep = True, False
            self._notify()
            try:
                metrics = await self._update_living(version)
            finally:
                self._updating = False
                for replica in self.replicas.replicas:
                    replica.progressed = time.monotonic()  # requests waited for the update
                self._notify()
        return metrics

    async def _update_living(self, version: int) -> dict[str, Any]:
        while True:
            while not (living := self.replicas.alive):
                await self._wait()
            lives = _lives(living)
            try:
                metrics = await self._send(living, version, restore=False)
            except WeightUpdateError as error:
                if not await self._any_died(lives):
                    raise
                logger.warning("%s. It is repeated with the replicas that are left", _one_line(error))
                continue
            self.version, self._weights_changed = version, False
            _serve(lives)
            return metrics

    async def wait_for_replica(self, changes: int) -> bool:
        """See `verl.workers.rollout.replica.Recovery`."""
        if self.changes == changes and not self._updating and not self._recovering and self._error is None:
            return False
        while self.changes == changes:
            await self._wait()
        return True

    def metrics(self) -> dict[str, float]:
        """Return `reliability/restarts`, the restarts of replicas since the start of the run."""
        return {"reliability/restarts": float(self.restarts.total())}

    async def kill(self, rank: int, reason: str) -> None:
        """Kill a replica that is stuck; it is restarted as after its death."""
        (replica,) = (replica for replica in self.replicas.replicas if replica.rank == rank)
        await replica.kill(reason)

    async def close(self) -> None:
        """Stop to watch and to restart."""
        for replica in self.replicas.replicas:
            replica.on_death = None
        monitor = [] if self._monitor is None else [self._monitor]
        await cancel_and_wait([*monitor, *self._checking.values(), *self._recovering.values()])

    # ---- noticing ----

    async def _watch(self) -> None:
        """Call every live replica's `health` again and again."""
        while True:
            await asyncio.sleep(self._watchdog.heartbeat_s)
            for replica in self.replicas.alive:
                if replica.rank not in self._checking:
                    self._checking[replica.rank] = self._task(self._check(replica))

    async def _check(self, replica: vLLMReplica) -> None:
        """Declare a replica dead if it says so, says nothing, or finishes no request."""
        life, limit = replica.starts, self._watchdog.engine_timeout_s
        try:
            async with asyncio.timeout(limit):
                await replica.health()
            if self._finishes_nothing(replica):
                await self._kill_stuck(replica, life)
        except ReplicaUnavailable:
            pass  # `_on_death` was called
        except TimeoutError:
            if _lives_on(replica, life):
                await replica.kill(f"replica {replica.rank} did not answer a health call within {limit:g} s")
        finally:
            self._checking.pop(replica.rank, None)

    def _finishes_nothing(self, replica: vLLMReplica) -> bool:
        waits = self._updating or self.replicas.asleep or replica.waits_for_weights
        silence = time.monotonic() - replica.progressed
        return replica.in_flight > 0 and not waits and silence > self._watchdog.generation_timeout_s

    async def _kill_stuck(self, replica: vLLMReplica, life: int) -> None:
        if self.write_stacks is not None:
            await self.write_stacks()
        if _lives_on(replica, life) and self._finishes_nothing(replica):
            limit = f"trainer.watchdog.generation_timeout_s={self._watchdog.generation_timeout_s:g}"
            await replica.kill(f"replica {replica.rank} is stuck: it finishes none of its requests ({limit})")

    async def _any_died(self, lives: Lives) -> bool:
        """Return True if one of these lives has ended, perhaps without notice so far."""
        await asyncio.gather(*(self._check(replica) for replica, _ in lives if replica.alive))
        return any(not _lives_on(replica, life) for replica, life in lives)

    # ---- restarting ----

    def _on_death(self, replica: vLLMReplica, reason: str) -> None:
        self._reasons.setdefault(replica.rank, reason)
        requests = f"{replica.in_flight} request(s) in flight" if replica.in_flight else "no request in flight"
        logger.warning("%s; it had %s", _one_line(reason), requests)
        if replica.rank not in self._recovering:
            self._recovering[replica.rank] = self._task(self._recover(replica, reason))

    async def _recover(self, replica: vLLMReplica, reason: str) -> None:
        try:
            while not replica.alive:
                await replica.kill(reason)
                if self.restarts[replica.rank] >= self._max_restarts:
                    raise self._failed(replica, reason)
                if any(other.waits_for_weights for other in self.replicas.alive):
                    await self._admit()
                while self._shares_memory and self.replicas.asleep:
                    await self._wait()
                reason = await self._restart(replica)
        except Exception as error:  # noqa: BLE001  (raised by `failure`)
            self._error = self._error or error
        finally:
            self._recovering.pop(replica.rank, None)
            self._notify()

    def _failed(self, replica: vLLMReplica, reason: str) -> ReplicaFailed:
        first = self._reasons[replica.rank]
        last = "" if reason == first else f". The last time: {reason}"
        return ReplicaFailed(
            f"replica {replica.rank} died, and was restarted {self.restarts[replica.rank]} time(s), "
            f"actor_rollout_ref.rollout.max_restarts={self._max_restarts}. The first error: {first}{last}"
        )

    async def _restart(self, replica: vLLMReplica) -> str:
        """Start a replica once and bring it to the weights of the run; return the reason if it is dead again."""
        self.restarts[replica.rank] += 1
        number = self.restarts[replica.rank]
        logger.warning("replica %d is started again, restart %d of %d", replica.rank, number, self._max_restarts)
        started = time.perf_counter()
        replica.waits_for_weights = True
        try:
            await self.replicas.start_one(replica)
        except Exception as error:  # noqa: BLE001  (the next restart may succeed; after the last one it is raised)
            return f"replica {replica.rank} did not start again: {error or type(error).__name__}"
        self._notify()  # `update` may wait for a replica that is alive
        await self._admit()
        if not replica.waits_for_weights:
            seconds = time.perf_counter() - started
            logger.info("replica %d serves version %s again, after %.1f s", replica.rank, self.version, seconds)
        return f"replica {replica.rank} died while it got its weights"

    async def _admit(self) -> None:
        """Bring restarted replicas to the trainer's weights, unless they have to wait for the next update."""
        async with self._exclusive():
            waiting = [replica for replica in self.replicas.alive if replica.waits_for_weights]
            if not waiting or self.version is None or (self._weights_changed and self.replicas.serving):
                return
            lives = _lives(waiting)
            version = self.version + (self._weights_changed and self._one_update_per_version)
            try:
                await self._send(waiting, version, restore=True)
            except WeightUpdateError as error:
                if not await self._any_died(lives):
                    raise
                logger.warning("%s", _one_line(error))
                return
            _serve(lives)
            self._notify()

    # ---- waiting ----

    def _notify(self) -> None:
        self.changes += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        await self._changed.wait()

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(coroutine, context=self._context.copy())


def _lives(replicas: Sequence[vLLMReplica]) -> Lives:
    return [(replica, replica.starts) for replica in replicas]


def _lives_on(replica: vLLMReplica, life: int) -> bool:
    return replica.alive and replica.starts == life


def _serve(lives: Lives) -> None:
    """Let replicas take requests, unless they died, and perhaps started again, since they got their weights."""
    for replica, life in lives:
        if _lives_on(replica, life):
            replica.waits_for_weights = False


def _one_line(reason: object) -> str:
    """Return a message as one line: Ray's errors have a paragraph."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 400 else f"{text[:400]} ..."
