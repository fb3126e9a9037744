"""Relays as Ray actors, and on which node an actor runs."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.config.rollout import CheckpointEngineConfig
from verl.utils.platform import devices_environment, visible_devices
from verl.utils.vllm.npu_settings import hccl_environment
from verl.workers.weight_sync.broadcast_proxy import DEVICES, BroadcastProxy
from verl.workers.weight_sync.collective import BroadcastProxyDied, CollectiveTransport, Node, SharedMemory


def where(_actor: Any, device: str) -> Node:
    """The node that an actor runs on; with `actor.__ray_call__.remote(where, device)` it is asked there."""
    visible = None if device == "cpu" else visible_devices(device)
    return Node(current_node_id(), ray.util.get_node_ip_address(), visible[0] if visible else None)


def current_node_id() -> str:
    """The id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def is_multi_node() -> bool:
    """Whether the cluster has more nodes than this one."""
    return sum(node["Alive"] for node in ray.nodes()) > 1


def transport(config: CheckpointEngineConfig, backend: str, device: str) -> SharedMemory | CollectiveTransport:
    """What `backend` names, as `resolve_backend` finds it, on a device (`cpu`, `cuda` or `npu`)."""
    if backend == "naive":
        return SharedMemory()

    def start(node: Node) -> _RayRelay:
        return _RayRelay(node, backend_on(device, backend), config.buckets_in_flight)

    return CollectiveTransport(start, timeout_s=config.timeout)


def backend_on(device: str, backend: str) -> str:
    """The backend of torch.distributed; on an NPU verl's users write nccl and get HCCL."""
    return "hccl" if (device, backend) == ("npu", "nccl") else backend


class _RayRelay:
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
