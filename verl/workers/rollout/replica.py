"""Rollout replicas: start, stop, health, and restart of dead ones."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from ray.exceptions import RayTaskError

from verl.single_controller.actor import Actor, ActorDied
from verl.single_controller.kill import kill_family
from verl.workers.rollout.request_channel import Request, RequestChannel, Response
from verl.workers.rollout.types import EngineDied, ReplicaHealth, ReplicaReport, ReplicaUnavailable, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from verl.workers.weight_sync.messages import Bucket, BucketReport, EngineReport, ManifestMessage
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.nodes import node_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class vLLMReplica:
    """One engine in one actor. With tensor parallelism its workers are child processes of the engine.

    Args:
        rank: index of this replica.
        server_arguments: keyword arguments of `vLLMHttpServer` except `replica_rank`.
        actor_options: Ray options of the actor: resources, placement.
        environment: environment variables of its process.

    Attributes:
        alive: the processes run, as far as is known.
        waits_for_weights: it was restarted, and no update has reached it since.
        on_death: called once with the reason when a start or a call shows that the replica is dead.
        pid: process id of the actor of the last start.
        starts: number of starts; tells one life of the replica from the next one.
        in_flight: number of requests.
        progressed: time (`time.monotonic`) of the last end of a request, or of the first of the present requests.
    """

    def __init__(
        self,
        rank: int,
        server_arguments: Mapping[str, Any],
        actor_options: Mapping[str, Any],
        environment: Mapping[str, str],
    ):
        self.rank = rank
        self.environment = dict(environment)
        self.alive = self.waits_for_weights = False
        self.on_death: Callable[[vLLMReplica, str], None] | None = None
        self.in_flight = self.starts = 0
        self.progressed = 0.0
        self.pid: int | None = None
        self.node: Node | None = None  # of the last start
        self._arguments = server_arguments
        self._options = actor_options
        self._actor: Actor[vLLMHttpServer] | None = None
        self._requests: RequestChannel | None = None
        self._starting = False

    async def start(self) -> ReplicaReport:
        """Start the actor and its engine. Returns and raises as `vLLMHttpServer.start`."""
        options = {**self._options, "runtime_env": {"env_vars": self.environment}}
        self._starting = True
        self._actor = Actor(vLLMHttpServer, options, **self._arguments, replica_rank=self.rank)
        self._requests = RequestChannel(self._submit_requests, self._next_responses)
        self.starts += 1
        self.pid = None
        try:
            self.pid = await self._actor.run(_pid_of)
            self.node = await self._actor.run(node_of, self._arguments["device"])
        except ActorDied as error:
            raise ReplicaUnavailable(f"replica {self.rank} died at its start: {error}") from error
        report = await self._call(vLLMHttpServer.start)
        self.alive, self._starting = True, False
        return report

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, generated: list[int]
    ) -> TokenOutput:
        """Call `vLLMHttpServer.generate`.

        Raises:
            ReplicaUnavailable: the replica is dead, or refuses to serve.
        """
        self.in_flight += 1
        if self.in_flight == 1:
            self.progressed = time.monotonic()
        try:
            if self._requests is None:
                raise ReplicaUnavailable(f"replica {self.rank} is not running")
            life = self.starts
            return await self._requests.request(prompt_ids, sampling_params, request_id, generated)
        except EngineDied as error:
            self._mark_dead(life, str(error))
            raise
        finally:
            self.in_flight -= 1
            self.progressed = time.monotonic()

    async def http_request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, str, bytes]:
        """Call `vLLMHttpServer.http_request`.

        Raises:
            ReplicaUnavailable: the replica is dead from now on; no weight update would make it serve again.
        """
        self.in_flight += 1
        try:
            return await self._call(vLLMHttpServer.http_request, method, path, headers, body)
        except ReplicaUnavailable:
            self.alive = False
            raise
        finally:
            self.in_flight -= 1

    async def _submit_requests(self, requests: Sequence[Request]) -> None:
        await self._call(vLLMHttpServer.submit_requests, requests)

    async def _next_responses(self) -> list[Response]:
        return await self._call(vLLMHttpServer.next_responses)

    async def begin_update(self, version: int, base: int | None = None) -> None:
        await self._call(vLLMHttpServer.wake_up, ["weights"])
        await self._call(vLLMHttpServer.begin_update, version, base)

    async def load_bucket(self, bucket: Bucket) -> BucketReport:
        return await self._call(vLLMHttpServer.load_bucket, bucket)

    async def finish_update(self, manifest: ManifestMessage) -> EngineReport:
        await self._call(vLLMHttpServer.wake_up, ["kv_cache"])
        return await self._call(vLLMHttpServer.finish_update, manifest)

    async def abort_update(self, reason: str) -> None:
        await self._call(vLLMHttpServer.abort_update, reason)

    async def sleep(self) -> None:
        await self._call(vLLMHttpServer.sleep)

    async def start_profile(self, first_step: int) -> None:
        await self._call(vLLMHttpServer.start_profile, first_step)

    async def stop_profile(self) -> None:
        await self._call(vLLMHttpServer.stop_profile)

    async def health(self) -> ReplicaHealth:
        return await self._call(vLLMHttpServer.health)

    async def parameter_hashes(self) -> list[dict[str, str]]:
        return await self._call(vLLMHttpServer.parameter_hashes)

    async def parameter_addresses(self) -> list[dict[str, int]]:
        return await self._call(vLLMHttpServer.parameter_addresses)

    async def _call(
        self,
        method: Callable[Concatenate[vLLMHttpServer, P], Coroutine[Any, Any, R]],
        *arguments: P.args,
        **keywords: P.kwargs,
    ) -> R:
        actor, life = self._actor, self.starts
        # A call that began in the last life may arrive in a process that is still loading, which has no engine.
        if actor is None or (self._starting and method is not vLLMHttpServer.start):
            raise ReplicaUnavailable(f"replica {self.rank} is not running")
        try:
            return await actor.call(method, *arguments, **keywords)
        except EngineDied as error:
            self._mark_dead(life, str(error))
            raise
        except ActorDied as error:
            reason = f"replica {self.rank} died during {method.__name__}: {error}"
            self._mark_dead(life, reason)
            raise ReplicaUnavailable(reason) from error

    def _mark_dead(self, life: int, reason: str) -> None:
        if self.alive and life == self.starts:
            self.alive = False
            if self.on_death is not None:
                self.on_death(self, reason)

    async def kill(self, reason: str) -> None:
        """End every process of the replica at once, also stopped ones. Calls in progress raise ReplicaUnavailable."""
        actor, self._actor = self._actor, None
        self._mark_dead(self.starts, reason)
        if actor is not None:
            if self.node is not None and self.pid is not None:
                await kill_family(self.node.id, self.pid)
            actor.kill()

    async def stop(self, timeout_s: float = 20.0) -> None:
        """Stop the engine with its processes, then kill the actor. No effect on a dead replica.

        While the engine is loading, its actor answers no calls and is killed at once.
        """
        actor, self._actor, self.alive = self._actor, None, False
        if actor is None:
            return
        if not self._starting:
            try:
                await asyncio.wait_for(actor.call(vLLMHttpServer.stop), timeout_s)
            except (ActorDied, RayTaskError) as error:
                logger.warning("replica %d did not stop by itself (%s): killing its process", self.rank, error)
            except TimeoutError:
                logger.warning("replica %d did not stop within %g s: killing its process", self.rank, timeout_s)
        actor.kill()


def _pid_of(_actor: object) -> int:
    return os.getpid()


class Recovery(Protocol):
    """Restarts dead replicas while the run goes on."""

    changes: int
    """Number of times that a replica began to serve, or an update ended."""

    async def wait_for_replica(self, changes: int) -> bool:
        """Wait until `self.changes` is another number than `changes`; False if nothing is in progress that changes it.

        Raises:
            Exception: no further restart is allowed.
        """


class ReplicaSet:
    """All replicas of a run.

    Args:
        replicas: constructed but not started.
        on_start: called with (rank, report) for each started replica.

    Attributes:
        recovery: restarts dead replicas; None: only `restart_dead` does.
        asleep: the replicas gave their memory to the trainer.
    """

    def __init__(self, replicas: list[vLLMReplica], on_start: Callable[[int, ReplicaReport], None] | None = None):
        self.replicas = replicas
        self._on_start = on_start
        self.recovery: Recovery | None = None
        self.asleep = False

    @property
    def alive(self) -> list[vLLMReplica]:
        return [replica for replica in self.replicas if replica.alive]

    @property
    def serving(self) -> list[vLLMReplica]:
        """Replicas that take requests: those that are alive, without restarted ones that no update has reached."""
        return [replica for replica in self.alive if not replica.waits_for_weights]

    async def start(self) -> None:
        """Start all replicas concurrently."""
        await asyncio.gather(*(self.start_one(replica) for replica in self.replicas))

    async def start_one(self, replica: vLLMReplica) -> None:
        report = await replica.start()
        if self._on_start is not None:
            self._on_start(replica.rank, report)

    async def restart_dead(self) -> int:
        """Restart dead replicas and return their number. They serve after the next weight update."""
        dead = [replica for replica in self.replicas if not replica.alive]
        for replica in dead:
            logger.warning("replica %d is dead: restarting it", replica.rank)
            await replica.stop(timeout_s=1.0)
        await asyncio.gather(*(self.start_one(replica) for replica in dead))
        return len(dead)

    async def sleep(self) -> None:
        """Make every replica give its memory to the trainer."""
        self.asleep = True
        outcomes = await asyncio.gather(*(replica.sleep() for replica in self.alive), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not (self.recovery and isinstance(outcome, ReplicaUnavailable)):
                raise outcome

    async def stop(self) -> None:
        """Stop all replicas."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
