"""The node of the Ray cluster on which a process runs."""

from __future__ import annotations

from typing import Any

import ray

from verl.utils.devices import visible_devices
from verl.workers.weight_sync.transports.base import Node


def node_of(_actor: Any, device: str) -> Node:
    """The node that an actor runs on; with `actor.__ray_call__.remote(node_of, device)` it is asked there."""
    visible = None if device == "cpu" else visible_devices(device)
    return Node(current_node_id(), ray.util.get_node_ip_address(), visible[0] if visible else None)


def current_node_id() -> str:
    """The id of the node that this process runs on."""
    return ray.get_runtime_context().get_node_id()


def is_multi_node() -> bool:
    """Whether the cluster has more nodes than this one."""
    return sum(node["Alive"] for node in ray.nodes()) > 1
