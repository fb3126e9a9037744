"""Steps of another process on command: it stops at a gate before each step, and the benchmark lets it through.

What two processes take for a step can then be measured in turn, each while the other one stands still. Standard library
only, and nothing of this project: the peer's environment imports it too.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

GATE = "BENCHMARK_GATE"  # environment variable: the file descriptor of the child's end
_REPORT = struct.Struct("!q")


class Gate:
    """The child's end, from the environment variable `GATE`."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=int(os.environ[GATE]))

    def arrive(self, tokens: int) -> None:
        """Report the tokens generated since the gate was last passed, and wait to be let through.

        Raises:
            EOFError: the benchmark is over.
        """
        self._socket.sendall(_REPORT.pack(tokens))
        if not self._socket.recv(1):
            raise EOFError("the benchmark is over")


class PacedProcess:
    """A process that stops at gates.

    Args:
        command, environment, directory: what to start, variables to add, where.
        log: a file for what it prints.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], directory: Path, log: Path):
        self._log = log
        self._socket, theirs = socket.socketpair()
        with theirs, log.open("w") as output:
            self.process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment, GATE: str(theirs.fileno())},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )

    def arrived(self) -> int:
        """Wait until it stands at the gate; the tokens it generated since it last stood there.

        Raises:
            RuntimeError: it ended; with the end of what it printed.
        """
        report = self._socket.recv(_REPORT.size, socket.MSG_WAITALL)
        if len(report) < _REPORT.size:
            status = self.process.wait()
            text = self._log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{self._log.stem} ended with status {status}:\n{text}")
        return _REPORT.unpack(report)[0]

    def step(self) -> tuple[float, int]:
        """Let it through; seconds until it stands at the gate again, and the tokens it generated."""
        started = time.perf_counter()
        self._socket.sendall(b"g")
        tokens = self.arrived()
        return time.perf_counter() - started, tokens

    def close(self) -> None:
        """End it; SIGTERM is a clean stop for both sides."""
        self.process.terminate()
        self._socket.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
