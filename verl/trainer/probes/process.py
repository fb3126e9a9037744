"""The parent's side of the probes: starts the child process, enforces time limits, collects the findings.

The child imports its packages while the parent checks the config. It runs no user code before `check` sends the job.
If a call hangs or ends the process, the parent reports it, and a new child runs the remaining kinds.

Messages from the child: ("kind", name) and ("step", text) before a kind and before each call; ("error", text),
("warning", text), ("note", text); ("samples", pickle); ("end", "").
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Self

from verl.config import PPOConfig
from verl.preflight.findings import Findings
from verl.trainer.probes.context import Job, with_samples
from verl.trainer.probes.kinds import user_code
from verl.utils.child_process import ending, start_child

STEP_SECONDS = 60.0
"""Limit of one call of user code."""
START_SECONDS = 300.0
"""Limit of the imports of a child process."""
_EXIT_SECONDS = 5.0


class Probes:
    """The probes of one run: `with Probes(config, starting=...) as probes: ...; probes.check(config, found, ...)`.

    Args:
        config: the composed config, which may still have errors.
        starting: see `user_code`.
        step_seconds: limit of one call of user code.
    """

    def __init__(self, config: PPOConfig, *, starting: bool, step_seconds: float = STEP_SECONDS):
        self._kinds = user_code(config, starting=starting)
        self._step_seconds = step_seconds
        self._child = _Child(self._kinds) if self._kinds else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def check(self, config: PPOConfig, found: Findings, *, device: str, elsewhere: bool = False) -> None:
        """Call the user's code and add what does not fit to `found`; does nothing without user code.

        Args:
            config: the checked config. If `found` has errors, nothing is called, because they would cause others.
            device: `cpu`, `cuda` or `npu`.
            elsewhere: see `Job`.
        """
        if self._child is None:
            return
        if found.errors:
            found.notes.append("your own functions and classes were not called; correct the errors first")
            return
        job = Job(config, self._kinds, device, elsewhere)
        while job.kinds:
            self._child = self._child or _Child(job.kinds)
            job, finished = self._run(self._child, job, found)
            self._close(graceful=finished)

    def _run(self, child: _Child, job: Job, found: Findings) -> tuple[Job, bool]:
        """Run one child process; return the job of the kinds that are left, and True if the child ran to its end."""
        kind, step, samples, limit = "", "", job.samples, START_SECONDS
        with contextlib.suppress(BrokenPipeError):  # it has died, which the loop finds
            child.connection.send(job)
        while True:
            if not child.connection.poll(limit):
                problem = f"did not finish within {limit:g} s"
                break
            try:
                name, content = child.connection.recv()
            except (EOFError, OSError):
                problem = f"ended the process of the check ({ending(child.wait())})"
                break
            if name == "end":
                return with_samples(job, (), None), True
            if name == "kind":
                kind = content
            elif name == "step":
                step, limit = content, self._step_seconds
            elif name == "samples":
                samples = content
            else:
                {"error": found.errors, "warning": found.warnings, "note": found.notes}[name].append(content)
        if not step:
            raise RuntimeError(f"the check of user code {problem}: {child.output()}")
        found.warnings.append(f"{step} {problem}; what follows it was not checked")
        left = job.kinds[job.kinds.index(kind) + 1 :] if kind else ()
        return with_samples(job, left, samples), False

    def _close(self, *, graceful: bool = False) -> None:
        if self._child is not None:
            self._child.close(graceful=graceful)
        self._child = None


class _Child:
    """A child process; its output goes to a file, because it must not mix with the output of the parent."""

    def __init__(self, kinds: tuple[str, ...]):
        ours, theirs = socket.socketpair()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        with theirs:
            self._process = start_child("verl.trainer.probes.child", fds=[theirs.fileno()], output=self._output)
        self.connection = Connection(ours.detach())
        self.connection.send(kinds)

    def output(self) -> str:
        """Return the end of the text that the process printed."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-2000:].strip()

    def wait(self) -> int:
        """Wait for the process, which has ended or is about to; kill it if it does not end. Return its exit code."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_EXIT_SECONDS)
        self._process.kill_family()
        return self._process.wait()

    def close(self, *, graceful: bool) -> None:
        """End the process and all processes that it started.

        Args:
            graceful: it has finished, so let it exit by itself, because the user's exit handlers run then.
        """
        self.connection.close()
        if graceful:
            self.wait()
        self._process.kill_family()
        self._process.wait()
        self._output.close()
