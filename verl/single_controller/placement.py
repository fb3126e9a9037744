"""Placement of the trainer ranks and the replicas on nodes and devices.

Hybrid (`rollout.nnodes=0`): replicas share the trainer's devices; replica `r` with tensor parallelism `t` uses the
devices of trainer ranks `r*t .. r*t + t - 1`. Standalone (`rollout.nnodes=n`): replicas have their own devices on n
nodes, the same number of replicas on each node. Every trainer node is a different one, and so is every replica node.
Engines of a teacher and of a reward model always have their own devices.
On a CPU all processes share the cores, so both modes only choose the node of a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from verl.config import PPOConfig
from verl.config.engine_pools import EnginePool, engine_pools
from verl.utils.devices import devices_environment

_RESOURCE = {"cuda": "GPU", "npu": "NPU"}
_RESERVATION_TIMEOUT_S = 60  # other processes of a shared cluster may just be ending

# Keyword arguments of `ray.remote` for one actor.
RayOptions = dict[str, Any]


def replica_count(config: PPOConfig) -> int:
    """Return the number of replicas that the config asks for.

    Raises:
        ValueError: the devices do not divide evenly into replicas.
    """
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
    """Ray options for every process of a run. `release()` returns the reserved resources.

    Attributes:
        trainers: options by trainer rank.
        replicas: options by replica.
        pools: by section of `engine_pools`, the options by engine.
    """

    trainers: list[RayOptions]
    replicas: list[RayOptions]
    pools: dict[str, list[RayOptions]] = field(default_factory=dict)
    _groups: list[PlacementGroup] = field(default_factory=list)

    def reserve(self, device: str, nodes: int, per_node: int, section: str) -> PlacementGroup:
        """Reserve a bundle of `per_node` devices on each of `nodes` nodes; `section` names the config keys.

        Raises:
            RuntimeError: the cluster has fewer devices or nodes.
        """
        group = _reserve(device, nodes, per_node, section)
        self._groups.append(group)
        return group

    def release(self) -> None:
        for group in self._groups:
            remove_placement_group(group)
        self._groups = []


def place_processes(config: PPOConfig, device: str) -> Placement:
    """Reserve devices and assign every process to a node.

    Args:
        device: `cpu`, `cuda` or `npu`.

    Raises:
        RuntimeError: the cluster has fewer devices or nodes than the config asks for.
    """
    nodes, per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    rollout, replicas, pools = config.actor_rollout_ref.rollout, replica_count(config), engine_pools(config)
    if device == "cpu":
        return _place_on_cpu(nodes, per_node, rollout.nnodes, replicas, pools)
    placement = Placement([], [])
    try:
        trainer_group = placement.reserve(device, nodes, per_node, "trainer")
        ranks = range(nodes * per_node)
        placement.trainers = [_in_bundle(trainer_group, rank // per_node, _device_request(device, 1)) for rank in ranks]
        if rollout.nnodes:
            group = placement.reserve(device, rollout.nnodes, rollout.n_gpus_per_node, "actor_rollout_ref.rollout")
            placement.replicas = _own_devices(
                group, device, replicas, rollout.nnodes, rollout.tensor_model_parallel_size
            )
        else:
            # The engine uses its ranks' devices without requesting them: their bundle already counts them.
            first_ranks = ranks[:: len(ranks) // replicas]
            placement.replicas = [_in_bundle(trainer_group, rank // per_node, {}) for rank in first_ranks]
        for pool in pools:
            group = placement.reserve(device, pool.nodes, pool.devices_per_node, pool.section)
            size = pool.engine.tensor_model_parallel_size
            placement.pools[pool.section] = _own_devices(group, device, pool.engines, pool.nodes, size)
    except RuntimeError:
        placement.release()
        raise
    return placement


def _own_devices(group: PlacementGroup, device: str, engines: int, nodes: int, size: int) -> list[RayOptions]:
    """Place engines of `size` devices each, the same number on each of the nodes of a group."""
    per_node, request = engines // nodes, _device_request(device, size)
    return [_in_bundle(group, engine // per_node, request) for engine in range(engines)]


def _place_on_cpu(
    trainer_nodes: int, per_node: int, rollout_nodes: int, replicas: int, pools: Sequence[EnginePool]
) -> Placement:
    """Place the trainer on the driver's node and those after it, standalone replicas on the nodes after the trainer's.

    If the cluster has a single node, one trainer node and one rollout node may both be that node. Engines of
    other models are on the driver's node.
    """
    driver_node = ray.get_runtime_context().get_node_id()
    alive = (node["NodeID"] for node in ray.nodes() if node["Alive"])
    nodes = sorted(alive, key=lambda node: (node != driver_node, node))
    if len(nodes) == 1 and trainer_nodes == 1 and rollout_nodes <= 1:
        nodes *= 2
    if trainer_nodes + rollout_nodes > len(nodes):
        raise RuntimeError(
            f"trainer.nnodes={trainer_nodes} and actor_rollout_ref.rollout.nnodes={rollout_nodes}: the cluster has "
            f"{len(nodes)} node(s); lower them, or add nodes to the cluster"
        )
    replica_nodes = nodes[trainer_nodes : trainer_nodes + rollout_nodes] or nodes[:trainer_nodes]
    # Ranks and replicas share the cores, so no process reserves any.
    return Placement(
        [on_node(nodes[rank // per_node]) for rank in range(trainer_nodes * per_node)],
        [on_node(replica_nodes[replica * len(replica_nodes) // replicas]) for replica in range(replicas)],
        {pool.section: [on_node(driver_node)] * pool.engines for pool in pools},
    )


def shared_devices(config: PPOConfig, device: str, rank_devices: Sequence[str | None], replica: int) -> dict[str, str]:
    """Return the environment that shows a replica the devices of its trainer ranks; empty if it shares no device.

    Args:
        device: `cpu`, `cuda` or `npu`.
        rank_devices: by rank, the id of the device that Ray assigned; None if the rank sees all devices of its node.
        replica: index of the replica.
    """
    if device == "cpu" or config.actor_rollout_ref.rollout.nnodes:
        return {}
    per_replica = len(rank_devices) // replica_count(config)
    first = replica * per_replica
    ids = [id for id in rank_devices[first : first + per_replica] if id is not None]
    if len(ids) < per_replica:
        ids = [str((first + i) % config.trainer.n_gpus_per_node) for i in range(per_replica)]
    return devices_environment(device, ids)


def _reserve(device: str, nodes: int, per_node: int, section: str) -> PlacementGroup:
    """Reserve a bundle of `per_node` devices on each of `nodes` different nodes; `section` names the config keys."""
    resource = _RESOURCE[device]
    group = placement_group([{resource: per_node, "CPU": per_node}] * nodes, strategy="STRICT_SPREAD")
    if not group.wait(timeout_seconds=_RESERVATION_TIMEOUT_S):
        available = ray.cluster_resources().get(resource, 0)
        alive = sum(node["Alive"] for node in ray.nodes())
        remove_placement_group(group)
        raise RuntimeError(
            f"{section}.nnodes={nodes}, {section}.n_gpus_per_node={per_node}: there are not {nodes} node(s) with "
            f"{per_node} free {resource} devices and {per_node} CPU cores each (the cluster has {available:g} devices "
            f"on {alive} node(s)); lower them, or stop the processes that use the devices"
        )
    return group


def _device_request(device: str, count: int) -> RayOptions:
    return {"num_gpus": count} if device == "cuda" else {"resources": {"NPU": count}}


def on_node(node: str) -> RayOptions:
    """Return the options of a task or an actor on the node with this id of Ray."""
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def _in_bundle(group: PlacementGroup, index: int, request: RayOptions) -> RayOptions:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": 0, "scheduling_strategy": strategy, **request}
