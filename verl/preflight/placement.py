"""Numbers of ranks, devices, replicas and nodes that a config asks for."""

from __future__ import annotations

from verl.config.actor import FSDPConfig
from verl.config.ppo import PPOConfig
from verl.config.weight_updates import resolve_backend


def trainer_ranks(config: PPOConfig) -> int:
    """Return the number of ranks of the trainer."""
    return config.trainer.n_gpus_per_node * config.trainer.nnodes


def weight_shards(config: PPOConfig, section: FSDPConfig) -> int:
    """Return the number of ranks that share one copy of a model's weights, as `verl.workers.engine.mesh`."""
    ranks = trainer_ranks(config)
    return ranks if section.fsdp_size < 1 else min(section.fsdp_size, ranks)


def shard_count(config: PPOConfig, ranks_per_sample: int) -> int:
    """Return the number of shards of a batch: one for each rank, or for the ranks that share samples."""
    return max(1, trainer_ranks(config) // ranks_per_sample)


def standalone_devices(config: PPOConfig) -> int:
    """Return the number of devices that only replicas use; 0 if they share the trainer's devices."""
    rollout = config.actor_rollout_ref.rollout
    return rollout.n_gpus_per_node * rollout.nnodes


def replica_count(config: PPOConfig) -> int:
    """Return the number of replicas."""
    devices = standalone_devices(config) or trainer_ranks(config)
    return devices // config.actor_rollout_ref.rollout.tensor_model_parallel_size


def replica_nodes(config: PPOConfig, device: str) -> int:
    """Return the number of nodes that hold replicas only.

    It is 0 with the backend `naive`, because shared memory needs replicas on the trainer's node.
    """
    return 0 if resolve_backend(config, device) == "naive" else config.actor_rollout_ref.rollout.nnodes
