"""Processes that run one step per command: each waits at a gate before a step until the benchmark opens it.

The benchmark can thus time the steps of two processes alternately, each while the other one waits. Imports only the
standard library, because the environment of TRL imports this file too.
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
    """The gate in the paced process, from the file descriptor in the environment variable `GATE`."""

    def __init__(self) -> None:
        self._socket = socket.socket(fileno=int(os.environ[GATE]))

    def arrive(self, tokens: int) -> None:
        """Report the number of tokens generated since the last gate, and wait until the gate opens.

        Raises:
            EOFError: the benchmark has closed its end.
        """
        self._socket.sendall(_REPORT.pack(tokens))
        if not self._socket.recv(1):
            raise EOFError("the benchmark is over")


class PacedProcess:
    """A process that waits at a gate before each step.

    Args:
        command: the command line.
        environment: variables to add to those of this process.
        directory: the working directory.
        log: file for its output.
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

    def wait_for_arrival(self) -> int:
        """Wait until the process is at the gate; return the tokens that it generated since its last arrival.

        Raises:
            RuntimeError: the process ended; the text has the end of its output.
        """
        report = self._socket.recv(_REPORT.size, socket.MSG_WAITALL)
        if len(report) < _REPORT.size:
            status = self.process.wait()
            text = self._log.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{self._log.stem} ended with status {status}:\n{text}")
        return _REPORT.unpack(report)[0]

    def step(self) -> tuple[float, int]:
        """Open the gate; return the seconds until the next arrival, and the tokens generated until then."""
        started = time.perf_counter()
        self._socket.sendall(b"g")
        tokens = self.wait_for_arrival()
        return time.perf_counter() - started, tokens

    def close(self) -> None:
        """End the process with SIGTERM, which is a clean stop for verl and TRL; kill it after 60 seconds."""
        self.process.terminate()
        self._socket.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
