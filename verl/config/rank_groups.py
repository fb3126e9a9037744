"""Numbers of ranks that are given the same samples, because they share their sequences or the layers of a model."""

from __future__ import annotations

from verl.config.actor import ActorConfig
from verl.config.critic import CriticConfig
from verl.config.ref import RefConfig
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel, ref_sequence_parallel


def actor_ranks_per_sample(actor: ActorConfig) -> int:
    """Return the number of ranks for the actor."""
    return actor_sequence_parallel(actor) * actor.fsdp_config.tensor_parallel_size


def ref_ranks_per_sample(ref: RefConfig, actor: ActorConfig) -> int:
    """Return the number of ranks for the reference model."""
    return ref_sequence_parallel(ref, actor) * ref.fsdp_config.tensor_parallel_size


def critic_ranks_per_sample(critic: CriticConfig) -> int:
    """Return the number of ranks for the critic."""
    return critic_sequence_parallel(critic) * critic.fsdp.tensor_parallel_size
