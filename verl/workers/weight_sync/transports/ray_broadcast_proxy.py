"""A broadcast proxy as a Ray actor on a given node."""

from __future__ import annotations

import os

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.actor import Actor
from verl.utils.devices import devices_environment
from verl.utils.vllm.npu_settings import hccl_environment
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.broadcast_proxy import DEVICES, BroadcastProxy


def start_broadcast_proxy(node: Node, *, backend: str, segments: int) -> Actor[BroadcastProxy]:
    """Start a `BroadcastProxy` on `node`. On an accelerator it shares the device `node.device`.

    Args:
        backend, segments: see `BroadcastProxy`.
    """
    device, environment = DEVICES[backend], {"OMP_NUM_THREADS": "1"}
    if device != "cpu":
        environment |= devices_environment(device, None if node.device is None else [node.device])
    if device == "npu":
        environment |= hccl_environment(os.environ)
    options = {
        "num_cpus": 0,
        "max_concurrency": 2,  # the second thread responds to `ready` during a broadcast
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False),
        "runtime_env": {"env_vars": environment},
    }
    return Actor(BroadcastProxy, options, backend, segments)
