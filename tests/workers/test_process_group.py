"""`join_process_group`: the time limit of the ranks' collective operations, and the address where rank 0 listens."""

import socket
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from verl.workers.process_group import join_process_group


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def left():
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("left")
def test_limit_and_address_are_those_that_are_asked_for():
    port = free_port()
    mesh = join_process_group("cpu", 0, 1, "127.0.0.1", port, timeout=77)
    addresses = {item.laddr for item in psutil.Process().net_connections("tcp") if item.status == psutil.CONN_LISTEN}
    assert {address.ip.removeprefix("::ffff:") for address in addresses if address.port == port} == {"127.0.0.1"}
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=77)
    assert mesh.size() == 1
