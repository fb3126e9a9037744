"""The process of a case: a fork of the campaign, with limits of time and memory, whose output goes to files."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

MEMORY = 4 << 30
"""Bytes of address space that a case may use beyond those of the campaign."""


@dataclass(frozen=True)
class Ended:
    """The end of a case's process.

    Attributes:
        status: exit status; negative: the signal that ended it.
        output: stdout and stderr.
        seconds: duration.
        stopped: the time limit was over, and the campaign ended it.
    """

    status: int
    output: str
    seconds: float
    stopped: bool


class Child:
    """A forked process that runs `body`, which returns its exit status.

    Args:
        body: runs in the child, in the directory `root/work` with `root/home` as home.
        root: the directory of the case.
        log: file for the output.
        seconds: time limit.
        processor_seconds: limit of processor time, which does not depend on the load of the machine.
    """

    def __init__(self, body: Callable[[], int], root: Path, log: Path, seconds: float, processor_seconds: int):
        self._log, self._begin, self._limit = log, time.monotonic(), seconds
        memory = _address_space() + MEMORY
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _run(body, root, log, memory, processor_seconds)
        self.fd = os.pidfd_open(self._pid)

    def left(self) -> float:
        """Return the seconds until the time limit."""
        return max(0.0, self._begin + self._limit - time.monotonic())

    def finish(self) -> Ended:
        """Wait for the end, or end the process at its time limit, with the processes that it started."""
        stopped = not wait([self.fd], self.left())
        # Processes that it started keep the number of the group in use, so that no other group can have it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        if stopped:
            os.kill(self._pid, signal.SIGKILL)
        _, code = os.waitpid(self._pid, 0)
        os.close(self.fd)
        output = self._log.read_text(encoding="utf-8", errors="replace")
        return Ended(os.waitstatus_to_exitcode(code), output, time.monotonic() - self._begin, stopped)


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _run(body: Callable[[], int], root: Path, log: Path, memory: int, processor_seconds: int) -> None:
    """Run the body and end the process without the exit handlers of the campaign."""
    status = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for fd in (1, 2):
            os.dup2(output, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  (the standard streams stay open)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
        os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "COLUMNS": "400"}
        tempfile.tempdir = None
        os.chdir(root / "work")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds + 5))
        status = _status(body)
    except BaseException:  # noqa: BLE001  (the interpreter prints every exception too)
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _status(body: Callable[[], int]) -> int:
    """Return the exit status as the interpreter does, which prints the text of `sys.exit("text")`."""
    try:
        return body()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        sys.stderr.write(f"{ended.code}\n")
        return 1
