"""The transport `naive`: replicas on the trainer's node map its shared memory."""

from __future__ import annotations

from collections.abc import Sequence

from verl.workers.weight_sync.driver import Receiver, Sender
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.transports.base import Node


class SharedMemoryTransport:
    """The way to replicas on the trainer's node, which needs nothing."""

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """See `CollectiveTransport.connect`.

        Raises:
            WeightUpdateError: a receiver on another node.
        """
        for _, node in receivers:
            if node != home:
                raise WeightUpdateError(
                    "actor_rollout_ref.rollout.checkpoint_engine.backend=naive: shared memory does not reach from the "
                    f"trainer's node {home} to a replica on node {node}; use nccl, hccl or gloo"
                )
        return sender, [receiver for receiver, _ in receivers]

    def close(self) -> None:
        """Nothing to end."""
