"""Child processes that run the user's code: a fresh interpreter, without the threads and imports of its parent."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# In the environment of a child; the processes that it starts inherit it.
_MARK = "VERL_CHILD"


class Child(subprocess.Popen[bytes]):
    """A process of `start_child`.

    Attributes:
        mark: entry of its environment, by which `kill_family` finds the processes that it started.
    """

    mark: bytes

    def kill_family(self) -> None:
        """Kill the process and every process that it started, also if it has ended itself.

        A process that left the session (`setsid`) is found on Linux, unless it also left the environment.
        """
        with contextlib.suppress(ProcessLookupError):  # nothing of the session is left
            os.killpg(self.pid, signal.SIGKILL)
        # Twice: a process may start another one while the list is read.
        for _ in range(2):
            for pid in _with_environment(self.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _with_environment(entry: bytes) -> list[int]:
    """Return the processes of this user that started with an entry `NAME=value` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it ended, or belongs to another user
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def interpreter_command(module: str, *arguments: int) -> list[str]:
    """Return the command of a new interpreter that calls `main(*arguments)` of `module`, with the parent's sys.path."""
    numbers = ", ".join(map(str, arguments))
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main({numbers})"
    return [sys.executable, "-c", code]


def start_child(module: str, *numbers: int, fds: Sequence[int], output: IO[bytes] | None = None) -> Child:
    """Start `main(*numbers, *fds, parent_pid)` of a module in a new session, with one thread for each library.

    Args:
        fds: open files that the child inherits.
        output: receives what the child prints; None: it prints where this process does.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    mark = secrets.token_hex(16)
    child = Child(
        interpreter_command(module, *numbers, *fds, os.getpid()),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env={**os.environ, **threads, _MARK: mark},
        pass_fds=tuple(fds),
        start_new_session=True,
    )
    child.mark = f"{_MARK}={mark}".encode()
    return child


def end_with_parent(parent_pid: int) -> None:
    """Make the kernel kill this process when its parent dies, even inside an endless loop.

    On other systems than Linux, only a closed connection ends the process, after its current call.
    """
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed in a child process")
    if os.getppid() != parent_pid:  # it died before the call above
        os._exit(1)


def ending(code: int) -> str:
    """Return the end of a process as text: its signal or its exit code."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
