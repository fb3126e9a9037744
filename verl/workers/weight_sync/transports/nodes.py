"""The node of the Ray cluster on which a process runs."""

from __future__ import annotations

from typing import Any

import ray

from verl.utils.devices import visible_devices
from verl.workers.weight_sync.transports.base import Node


def node_of(_actor: object, device: str) -> Node:
    """Return the node of an actor. To be evaluated in the actor's process: `await actor.run(node_of, device)`."""
    visible = None if device == "cpu" else visible_devices(device)
    address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # no types in Ray
    return Node(current_node_id(), address, visible[0] if visible else None)


def current_node_id() -> str:
    """Return the id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def is_multi_node() -> bool:
    """Return whether the cluster has more than one node."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # no types in Ray
    return sum(bool(node["Alive"]) for node in nodes) > 1
