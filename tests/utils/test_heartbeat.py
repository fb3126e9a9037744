"""Signs of life of a real child process: during a computation, while it is stopped, and its stacks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from verl.utils.heartbeat import (
    VARIABLE,
    Beacon,
    current_beacon,
    heartbeat_environment,
    send_heartbeats,
    set_beacon,
)

PROGRAM = """
from verl.utils.heartbeat import send_heartbeats_from_environment
send_heartbeats_from_environment("part")
send_heartbeats_from_environment("part")
def endless():
    while True:
        sum(range(1000))
endless()
"""


@pytest.fixture
def beacon(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(60)
    found = Beacon("127.0.0.1", server.getsockname()[1], "secret", 0.02, str(tmp_path / "stacks"))
    set_beacon(found)
    yield found, server
    set_beacon(None)
    server.close()


def test_a_busy_process_sends_signs_of_life_until_it_is_stopped(beacon, tmp_path):
    _, server = beacon
    environment = {**os.environ, **heartbeat_environment("worker 3")}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment) as process:
        try:
            connection, _ = server.accept()
            connection.settimeout(60)
            with connection, connection.makefile("rb") as lines:
                hello = json.loads(lines.readline())
                assert (hello["key"], hello["role"], hello["pid"]) == ("secret", "worker 3 (part)", process.pid)
                assert [lines.readline() for _ in range(5)] == [b"\n"] * 5

                process.send_signal(signal.SIGUSR1)
                (file,) = (tmp_path / "stacks").iterdir()
                deadline = time.monotonic() + 60
                while "in endless" not in file.read_text() and time.monotonic() < deadline:
                    lines.readline()
                assert file.name == f"worker_3_(part).{process.pid}.txt" and "in endless" in file.read_text()

                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)
                connection.setblocking(False)
                with pytest.raises(BlockingIOError):
                    while connection.recv(1 << 16):
                        pass
                process.send_signal(signal.SIGCONT)
                connection.settimeout(60)
                assert connection.recv(1) == b"\n"
            # It was one connection, though the program asked twice.
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()
        finally:
            process.kill()


def test_without_a_beacon_nothing_is_sent():
    assert current_beacon() is None and heartbeat_environment("worker") == {} and VARIABLE not in os.environ
    send_heartbeats(None, "worker")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
