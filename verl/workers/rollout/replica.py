"""Rollout replicas: start, stop, health, and restart of dead ones."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.exceptions import RayTaskError

from verl.single_controller.actor import Actor, ActorDied
from verl.workers.rollout.request_channel import Request, RequestChannel, Response
from verl.workers.rollout.types import ReplicaHealth, ReplicaReport, ReplicaUnavailable, TokenOutput
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
        self.alive = False
        self.in_flight = 0
        self.node: Node | None = None  # of the last start
        self._arguments = server_arguments
        self._options = actor_options
        self._actor: Actor[vLLMHttpServer] | None = None
        self._requests: RequestChannel | None = None

    async def start(self) -> ReplicaReport:
        """Start the actor and its engine. Returns and raises as `vLLMHttpServer.start`."""
        options = {**self._options, "runtime_env": {"env_vars": self.environment}}
        self._actor = Actor(vLLMHttpServer, options, **self._arguments, replica_rank=self.rank)
        self._requests = RequestChannel(self._submit_requests, self._next_responses)
        report = await self._call(vLLMHttpServer.start)
        self.node = await self._actor.run(node_of, self._arguments["device"])
        self.alive = True
        return report

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, generated: list[int]
    ) -> TokenOutput:
        """Call `vLLMHttpServer.generate`.

        Raises:
            ReplicaUnavailable: the replica is dead, or refuses to serve.
        """
        self.in_flight += 1
        try:
            if self._requests is None:
                raise ReplicaUnavailable(f"replica {self.rank} is not running")
            return await self._requests.request(prompt_ids, sampling_params, request_id, generated)
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
        if self._actor is None:
            raise ReplicaUnavailable(f"replica {self.rank} is not running")
        try:
            return await self._actor.call(method, *arguments, **keywords)
        except ActorDied as error:
            self.alive = False
            raise ReplicaUnavailable(f"replica {self.rank} died during {method.__name__}: {error}") from error

    async def stop(self, timeout_s: float = 20.0) -> None:
        """Stop the engine with its processes, then kill the actor. No effect on a dead replica."""
        actor, self._actor, self.alive = self._actor, None, False
        if actor is None:
            return
        try:
            await asyncio.wait_for(actor.call(vLLMHttpServer.stop), timeout_s)
        except (ActorDied, RayTaskError, TimeoutError) as error:
            logger.warning("replica %d did not stop by itself (%s): killing its process", self.rank, error)
        actor.kill()


class ReplicaSet:
    """All replicas of a run.

    Args:
        replicas: constructed but not started.
        on_start: called with (rank, report) for each started replica.
    """

    def __init__(self, replicas: list[vLLMReplica], on_start: Callable[[int, ReplicaReport], None] | None = None):
        self.replicas = replicas
        self._on_start = on_start

    @property
    def alive(self) -> list[vLLMReplica]:
        return [replica for replica in self.replicas if replica.alive]

    async def start(self) -> None:
        """Start all replicas concurrently."""
        await asyncio.gather(*(self._start(replica) for replica in self.replicas))

    async def _start(self, replica: vLLMReplica) -> None:
        report = await replica.start()
        if self._on_start is not None:
            self._on_start(replica.rank, report)

    async def restart_dead(self) -> int:
        """Restart dead replicas and return their number. They serve after the next weight update."""
        dead = [replica for replica in self.replicas if not replica.alive]
        for replica in dead:
            logger.warning("replica %d is dead: restarting it", replica.rank)
            await replica.stop(timeout_s=1.0)
        await asyncio.gather(*(self._start(replica) for replica in dead))
        return len(dead)

    async def sleep(self) -> None:
        """Make every replica give its memory to the trainer."""
        await asyncio.gather(*(replica.sleep() for replica in self.alive))

    async def stop(self) -> None:
        """Stop all replicas."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
