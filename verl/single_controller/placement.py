"""Where the trainer's ranks and the replicas run.

Hybrid (`rollout.nnodes=0`): replicas share the trainer's devices; replica `r` with tensor parallelism `t` sits on the
devices of trainer ranks `r*t .. r*t + t - 1`. Standalone (`rollout.nnodes=n`): they have devices of their own on n
nodes, so many replicas on each. The nodes of the trainer are different ones, and so are those of the replicas. On a
CPU, where cores are shared anyway, both only say on which node a process runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from verl.config import PPOConfig
from verl.utils.platform import devices_environment

_RESOURCE = {"cuda": "GPU", "npu": "NPU"}


def replica_count(config: PPOConfig) -> int:
    """How many replicas the config asks for."""
    rollout = config.actor_rollout_ref.rollout
    devices = rollout.n_gpus_per_node * rollout.nnodes or config.trainer.n_gpus_per_node * config.trainer.nnodes
    per_replica = rollout.tensor_model_parallel_size * rollout.data_parallel_size
    if devices % per_replica:
        raise ValueError(
            f"{devices} devices do not divide into replicas of tensor_model_parallel_size x data_parallel_size = "
            f"{per_replica}: choose a divisor of {devices}"
        )
    return devices // per_replica


@dataclass
class Placement:
    """Ray options for every process of a run; `release()` gives the resources back.

    Attributes:
        trainers: options for each trainer rank.
        replicas: options for each replica.
    """

    trainers: list[dict[str, Any]]
    replicas: list[dict[str, Any]]
    _groups: list[PlacementGroup] = field(default_factory=list)

    def release(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []


def place(config: PPOConfig, device: str) -> Placement:
    """Reserve devices and say where each process goes.

    Raises:
        RuntimeError: the cluster has fewer devices or nodes than the config asks for.
    """
    nodes, per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    rollout, replicas = config.actor_rollout_ref.rollout, replica_count(config)
    if device == "cpu":
        return _place_on_cpu(nodes, per_node, rollout.nnodes, replicas)
    own = _reserve(device, nodes, per_node, "trainer")
    ranks = range(nodes * per_node)
    trainers = [_in_bundle(own, rank // per_node, resources=_device_request(device, 1)) for rank in ranks]
    if not rollout.nnodes:
        # The engine sees the devices of its trainers without owning them: the trainer's bundle already counts them.
        first = ranks[:: len(ranks) // replicas]
        return Placement(trainers, [_in_bundle(own, rank // per_node, resources={}) for rank in first], [own])
    try:
        others = _reserve(device, rollout.nnodes, rollout.n_gpus_per_node, "actor_rollout_ref.rollout")
    except RuntimeError:
        remove_placement_group(own)
        raise
    size, each = rollout.tensor_model_parallel_size, replicas // rollout.nnodes
    apart = [_in_bundle(others, r // each, resources=_device_request(device, size)) for r in range(replicas)]
    return Placement(trainers, apart, [own, others])


def _place_on_cpu(trainer_nodes: int, per_node: int, rollout_nodes: int, replicas: int) -> Placement:
    """The trainer from the driver's node on, replicas of their own on the nodes after those.

    A cluster of one node stands for as many as there should be of one each.
    """
    own = ray.get_runtime_context().get_node_id()
    nodes = sorted((node["NodeID"] for node in ray.nodes() if node["Alive"]), key=lambda node: (node != own, node))
    if len(nodes) == 1 and trainer_nodes == 1 and rollout_nodes <= 1:
        nodes *= 2
    if trainer_nodes + rollout_nodes > len(nodes):
        raise RuntimeError(
            f"trainer.nnodes={trainer_nodes} and actor_rollout_ref.rollout.nnodes={rollout_nodes}: the cluster has "
            f"{len(nodes)} node(s); lower them, or add nodes to it"
        )
    homes = nodes[trainer_nodes : trainer_nodes + rollout_nodes] or nodes[:trainer_nodes]
    # Ranks and replicas take turns on the same cores, so none of them reserves any.
    return Placement(
        [_on_node(nodes[rank // per_node]) for rank in range(trainer_nodes * per_node)],
        [_on_node(homes[rank * len(homes) // replicas]) for rank in range(replicas)],
    )


def shared_devices(config: PPOConfig, device: str, seen: Sequence[str | None], replica: int) -> dict[str, str]:
    """Environment that shows replica `replica` the devices it shares with its trainers; empty where it shares none.

    Args:
        seen: by rank, the device that Ray gave it; None where it sees all of its node.
    """
    if device == "cpu" or config.actor_rollout_ref.rollout.nnodes:
        return {}
    per_replica = len(seen) // replica_count(config)
    first = replica * per_replica
    own = [id for id in seen[first : first + per_replica] if id is not None]
    if len(own) < per_replica:
        own = [str((first + i) % config.trainer.n_gpus_per_node) for i in range(per_replica)]
    return devices_environment(device, own)


def _reserve(device: str, nodes: int, per_node: int, section: str) -> PlacementGroup:
    """A bundle of `per_node` devices on each of `nodes` different nodes; the keys of `section` asked for them."""
    resource = _RESOURCE[device]
    group = placement_group([{resource: per_node, "CPU": per_node}] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=60):
        available = ray.cluster_resources().get(resource, 0)
        alive = sum(node["Alive"] for node in ray.nodes())
        remove_placement_group(group)
        raise RuntimeError(
            f"{section}.nnodes={nodes}, {section}.n_gpus_per_node={per_node}: there are not {nodes} node(s) with "
            f"{per_node} free {resource} devices and {per_node} CPU cores each (the cluster has {available:g} devices "
            f"on {alive} node(s)); lower them, or end what occupies the devices"
        )
    return group


def _device_request(device: str, count: int) -> dict[str, Any]:
    return {"num_gpus": count} if device == "cuda" else {"resources": {"NPU": count}}


def _on_node(node: str) -> dict[str, Any]:
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _in_bundle(group: PlacementGroup, index: int, resources: dict[str, Any]) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": 0, "scheduling_strategy": strategy, **resources}
