"""The transport `naive`: replicas on the trainer's node map its shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from verl.workers.weight_sync.driver import Receiver, Sender
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.transports.base import Node


class SharedMemoryTransport:
    """Leaves sender and receivers as they are: all of them run on one node."""

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """Return the arguments; see `Transport.connect`.

        Raises:
            WeightUpdateError: a receiver runs on another node.
        """
        for _, node in receivers:
            if node != home:
                raise WeightUpdateError(
                    "actor_rollout_ref.rollout.checkpoint_engine.backend=naive: shared memory does not reach from the "
                    f"trainer's node {home} to a replica on node {node}; use nccl, hccl or gloo"
                )
        return sender, [receiver for receiver, _ in receivers]

    def close(self) -> None:
        """Do nothing: this transport has no processes."""
