"""Rollout replicas: start them, stop them, see whether they live, start a dead one again."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from verl.workers.rollout.request_channel import RequestChannel
from verl.workers.rollout.types import ReplicaUnavailable, TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.nodes import node_of

logger = logging.getLogger(__name__)


def unwrapped(error: BaseException) -> BaseException:
    """What a remote call raised, as the remote side raised it."""
    return error.cause if isinstance(error, RayTaskError) and error.cause is not None else error


class vLLMReplica:
    """One engine in an actor of its own (with tensor parallelism: its workers are the engine's processes).

    Args:
        rank: index of this replica.
        server_arguments: keyword arguments of `vLLMHttpServer` except `replica_rank`.
        actor_options: Ray options of the actor: resources, placement.
        environment: variables that its process is started with.
    """

    def __init__(
        self, rank: int, server_arguments: dict[str, Any], actor_options: dict[str, Any], environment: dict[str, str]
    ):
        self.rank = rank
        self.environment = environment
        self.alive = False
        self.in_flight = 0
        self.node: Node | None = None  # where it was started last
        self._arguments = server_arguments
        self._options = actor_options
        self._actor: Any = None
        self._requests: RequestChannel | None = None

    async def start(self) -> dict[str, Any]:
        """Start the actor and its engine; what `vLLMHttpServer.start` returns."""
        options = {**self._options, "runtime_env": {"env_vars": self.environment}}
        self._actor = ray.remote(**options)(vLLMHttpServer).remote(**self._arguments, replica_rank=self.rank)
        self._requests = RequestChannel(
            functools.partial(self._call, "take_requests"), functools.partial(self._call, "some_answers")
        )
        report = await self._call("start")
        self.node = await self._call("__ray_call__", node_of, self._arguments["device"])
        self.alive = True
        return report

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, answered: list[int]
    ) -> TokenOutput:
        """See `vLLMHttpServer.generate`. A dead actor is `ReplicaUnavailable` like one that refuses."""
        self.in_flight += 1
        try:
            if self._requests is None:
                raise ReplicaUnavailable(f"replica {self.rank} is not running")
            return await self._requests.request(prompt_ids, sampling_params, request_id, answered)
        finally:
            self.in_flight -= 1

    async def begin_update(self, version: int, base: int | None = None) -> None:
        await self._call("wake_up", ["weights"])
        await self._call("begin_update", version, base)

    async def load_bucket(self, bucket: dict[str, Any]) -> None:
        await self._call("load_bucket", bucket)

    async def finish_update(self, manifest: dict[str, Any]) -> dict[str, Any]:
        await self._call("wake_up", ["kv_cache"])
        return await self._call("finish_update", manifest)

    async def abort_update(self, reason: str) -> None:
        await self._call("abort_update", reason)

    async def sleep(self) -> None:
        await self._call("sleep")

    async def health(self) -> dict[str, Any]:
        return await self._call("health")

    async def parameter_hashes(self) -> list[dict[str, str]]:
        return await self._call("parameter_hashes")

    async def parameter_addresses(self) -> list[dict[str, int]]:
        return await self._call("parameter_addresses")

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise ReplicaUnavailable(f"replica {self.rank} is not running")
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayActorError as error:
            self.alive = False
            raise ReplicaUnavailable(f"replica {self.rank} died during {method}: {error}") from error
        except RayTaskError as error:
            raise unwrapped(error) from None

    async def stop(self, timeout_s: float = 20.0) -> None:
        """End the engine with its processes, then the actor; harmless where it is already dead."""
        actor, self._actor, self.alive = self._actor, None, False
        if actor is None:
            return
        try:
            await asyncio.wait_for(asyncio.wrap_future(actor.stop.remote().future()), timeout_s)
        except (RayActorError, RayTaskError, TimeoutError) as error:
            logger.warning("replica %d did not stop by itself (%s): ending its process", self.rank, error)
        ray.kill(actor)


class ReplicaSet:
    """All replicas of a run.

    Args:
        replicas: made but not started.
        on_start: called with (rank, report) for each replica that started.
    """

    def __init__(self, replicas: list[vLLMReplica], on_start: Callable[[int, dict[str, Any]], None] | None = None):
        self.replicas = replicas
        self._on_start = on_start

    @property
    def alive(self) -> list[vLLMReplica]:
        return [replica for replica in self.replicas if replica.alive]

    async def start(self) -> None:
        """Start all of them at the same time."""
        await asyncio.gather(*(self._start(replica) for replica in self.replicas))

    async def _start(self, replica: vLLMReplica) -> None:
        report = await replica.start()
        if self._on_start is not None:
            self._on_start(replica.rank, report)

    async def restart_dead(self) -> int:
        """Start the dead ones again; they serve after the next weight update. Returns how many there were."""
        dead = [replica for replica in self.replicas if not replica.alive]
        for replica in dead:
            logger.warning("replica %d is dead: starting it again", replica.rank)
            await replica.stop(timeout_s=1.0)
        await asyncio.gather(*(self._start(replica) for replica in dead))
        return len(dead)

    async def sleep(self) -> None:
        """Let every replica give its memory to the trainer."""
        await asyncio.gather(*(replica.sleep() for replica in self.alive))

    async def stop(self) -> None:
        """Stop all of them."""
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
