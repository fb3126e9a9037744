"""Where the trainer's ranks and the replicas run.

Hybrid (`rollout.nnodes=0`): replicas share the trainer's devices; replica `r` with tensor parallelism `t` sits on the
devices of trainer ranks `r*t .. r*t + t - 1`. Standalone (`rollout.nnodes=1`): replicas have devices of their own.
On a CPU both only mean processes, since cores are shared anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.trainer.config import PPOConfig

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
        RuntimeError: the cluster has fewer devices than the config asks for.
    """
    nodes, per_node = config.trainer.nnodes, config.trainer.n_gpus_per_node
    replicas = replica_count(config)
    if device == "cpu":
        # Ranks and replicas take turns on the same cores, so none of them reserves any.
        return Placement(
            [{"num_cpus": 0} for _ in range(nodes * per_node)],
            [{"num_cpus": 0} for _ in range(replicas)],
        )
    if config.actor_rollout_ref.rollout.nnodes:
        raise NotImplementedError(
            f"actor_rollout_ref.rollout.nnodes={config.actor_rollout_ref.rollout.nnodes} on {device} is not supported "
            "yet: use 0, where replicas share the trainer's devices"
        )
    groups = [_reserve(_RESOURCE[device], per_node) for _ in range(nodes)]
    bundles = [(group, index) for group in groups for index in range(per_node)]
    per_replica = len(bundles) // replicas
    trainers = [_in_bundle(*bundle, resources=_device_request(device)) for bundle in bundles]
    # The engine sees the devices of its trainers without owning them: the trainer's bundle already counts them.
    shared = [_in_bundle(*bundles[r * per_replica], resources={}) for r in range(replicas)]
    return Placement(trainers, shared, groups)


def visible_devices(config: PPOConfig, device: str, replica: int) -> dict[str, str]:
    """Environment that shows replica `replica` the devices it shares with its trainers; empty on a CPU."""
    if device == "cpu":
        return {}
    per_node = config.trainer.n_gpus_per_node
    per_replica = config.trainer.nnodes * per_node // replica_count(config)
    first = replica * per_replica % per_node
    ids = ",".join(str(first + i) for i in range(per_replica))
    if device == "cuda":
        return {"CUDA_VISIBLE_DEVICES": ids, "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
    return {"ASCEND_RT_VISIBLE_DEVICES": ids, "RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES": "1"}


def _reserve(resource: str, count: int) -> PlacementGroup:
    group = placement_group([{resource: 1, "CPU": 1}] * count, strategy="STRICT_PACK")
    if not group.wait(timeout_seconds=60):
        available = ray.cluster_resources().get(resource, 0)
        remove_placement_group(group)
        raise RuntimeError(
            f"trainer.n_gpus_per_node={count}: no node has {count} free {resource} devices with a CPU core each "
            f"(the cluster has {available:g}); lower it, or end what occupies them"
        )
    return group


def _device_request(device: str) -> dict[str, Any]:
    return {"num_gpus": 1} if device == "cuda" else {"resources": {"NPU": 1}}


def _in_bundle(group: PlacementGroup, index: int, resources: dict[str, Any]) -> dict[str, Any]:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    return {"num_cpus": 0, "scheduling_strategy": strategy, **resources}
