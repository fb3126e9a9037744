"""The interface of a transport: how a bucket gets from the trainer's node to each replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from verl.workers.weight_sync.driver import Receiver, Sender


@dataclass(frozen=True)
class Node:
    """Where a process runs.

    Attributes:
        id: of the node, unique in the cluster.
        address: of the node in the cluster's network.
        device: of those that the process sees, the first; None where that is not restricted.
    """

    id: str
    address: str = field(compare=False)
    device: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


class Transport(Protocol):
    """Wraps the sender and the receivers of an update so that each bucket reaches every receiver's node."""

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """Return the sender and the receivers to update with.

        Args:
            sender: runs on the node `home`.
            receivers: each with the node that it runs on.

        Raises:
            WeightUpdateError: a receiver runs on a node that this transport does not reach.
        """

    def close(self) -> None:
        """End every process of the transport."""
