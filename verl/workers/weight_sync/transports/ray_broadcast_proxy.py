"""Relays as Ray actors, and on which node an actor runs."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.utils.devices import devices_environment
from verl.utils.vllm.npu_settings import hccl_environment
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.broadcast_proxy import DEVICES, BroadcastProxy
from verl.workers.weight_sync.transports.collective import BroadcastProxyDied


class RayBroadcastProxy:
    """A `BroadcastProxy` on `node`, where it shares a device with the process that `node` was asked of."""

    def __init__(self, node: Node, backend: str, segments: int):
        device, environment = DEVICES[backend], {"OMP_NUM_THREADS": "1"}
        if device != "cpu":
            environment |= devices_environment(device, None if node.device is None else [node.device])
        if device == "npu":
            environment |= hccl_environment(os.environ)
        options = {
            "num_cpus": 0,
            "max_concurrency": 2,  # one to answer during a broadcast
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
            "runtime_env": {"env_vars": environment},
        }
        self._actor: Any = ray.remote(**options)(BroadcastProxy).remote(backend, segments)

    async def call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._actor, method).remote(*arguments)
        except RayTaskError as error:
            raise (error if error.cause is None else error.cause) from None
        except RayActorError as error:
            raise BroadcastProxyDied(f"its relay died: {error}") from error

    def end(self) -> None:
        ray.kill(self._actor)
