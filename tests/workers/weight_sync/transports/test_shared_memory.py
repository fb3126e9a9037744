"""Tests of the transport for replicas on the trainer's node."""

import pytest

from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.shared_memory import SharedMemoryTransport

HOME, REMOTE = Node("home", "10.0.0.1"), Node("left", "10.0.0.1")


def test_connect_returns_its_arguments_and_refuses_a_remote_replica():
    sender, (local, remote) = object(), ((object(), HOME), (object(), REMOTE))
    assert SharedMemoryTransport().connect(sender, HOME, [local]) == (sender, [local[0]])
    with pytest.raises(WeightUpdateError, match=r"backend=naive.*\(home\).*\(left\).*use nccl, hccl or gloo"):
        SharedMemoryTransport().connect(sender, HOME, [local, remote])
