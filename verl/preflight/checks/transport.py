"""How new weights reach replicas on other nodes."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.weight_updates import BACKENDS, full_update_reason, resolve_backend
from verl.preflight.findings import Findings

_FIELD = "actor_rollout_ref.rollout.checkpoint_engine.backend"


def check_transport(config: PPOConfig, device: str, found: Findings) -> None:
    """The transport has to be one of the device's, and to reach as far as the replicas are placed."""
    rollout = config.actor_rollout_ref.rollout
    why = full_update_reason(rollout, device)
    if rollout.checkpoint_engine.delta == "on" and why is not None:
        found.errors.append(
            f"actor_rollout_ref.rollout.checkpoint_engine.delta=on: every update must send everything ({why}); "
            "change that, or use auto or off"
        )
    backend, usable = resolve_backend(config, device), BACKENDS[device]
    if backend == "naive":
        if rollout.nnodes > 1:
            found.errors.append(
                f"{_FIELD}=naive: shared memory does not reach the replicas on actor_rollout_ref.rollout.nnodes="
                f"{rollout.nnodes} nodes; use {usable[0]}"
            )
    elif backend not in usable:
        found.errors.append(f"{_FIELD}={backend}: does not work on trainer.device={device}; use {' or '.join(usable)}")


def replica_nodes(config: PPOConfig, device: str) -> int:
    """Nodes that the replicas have to themselves; 0 where they share the trainer's, as shared memory demands."""
    return 0 if resolve_backend(config, device) == "naive" else config.actor_rollout_ref.rollout.nnodes
