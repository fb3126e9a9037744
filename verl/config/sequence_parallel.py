"""Number of ranks that share the sequences of a micro-batch, of each model: `ulysses_sequence_parallel_size`.

The key stands in a role's section and in its `fsdp_config`. As in upstream verl, a value above 1 in the section counts,
else that of `fsdp_config`; the reference model takes the actor's value unless it has its own.
"""

from __future__ import annotations

from verl.config.actor import ActorConfig
from verl.config.critic import CriticConfig
from verl.config.ref import RefConfig


def actor_sequence_parallel(actor: ActorConfig) -> int:
    """Return the number of ranks for the actor."""
    return _first_above_1(actor.ulysses_sequence_parallel_size, actor.fsdp_config.ulysses_sequence_parallel_size)


def ref_sequence_parallel(ref: RefConfig, actor: ActorConfig) -> int:
    """Return the number of ranks for the reference model."""
    own = _first_above_1(ref.ulysses_sequence_parallel_size, ref.fsdp_config.ulysses_sequence_parallel_size)
    return actor_sequence_parallel(actor) if own == 1 and ref.ulysses_sequence_parallel_size is None else own


def critic_sequence_parallel(critic: CriticConfig) -> int:
    """Return the number of ranks for the critic."""
    return _first_above_1(critic.ulysses_sequence_parallel_size, critic.fsdp.ulysses_sequence_parallel_size)


def _first_above_1(*sizes: int | None) -> int:
    return next((size for size in sizes if size is not None and size > 1), 1)
