"""The interface of a transport, which brings each bucket from the trainer's node to every replica."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from verl.workers.weight_sync.driver import Receiver, Sender


@dataclass(frozen=True)
class Node:
    """The node on which a process runs. Two nodes are equal if their ids are.

    Attributes:
        id: unique in the cluster.
        address: in the cluster's network.
        device: first device that the process sees; None if it sees all devices of the node.
    """

    id: str
    address: str = field(compare=False)
    device: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.address} ({self.id[:8]})"


class Transport(Protocol):
    """Wraps the sender and the receivers of an update so that each bucket reaches the node of every receiver."""

    def connect(
        self, sender: Sender, home: Node, receivers: Sequence[tuple[Receiver, Node]]
    ) -> tuple[Sender, list[Receiver]]:
        """Return a sender and receivers for `update_weights` that use this transport.

        Args:
            sender: runs on the node `home`.
            receivers: each with the node that it runs on.

        Raises:
            WeightUpdateError: a receiver runs on a node that this transport does not reach.
        """

    def close(self) -> None:
        """End every process of the transport."""
