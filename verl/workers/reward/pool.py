"""Pool of scoring processes, and the driver thread that sends them samples, enforces time limits and replaces them.

A general process pool does not fit: a sample that hangs must cost only its own time limit. Here samples are sent in
small groups for speed, but each has its own limit; async functions also run in these processes, so a coroutine that
blocks its event loop can be killed; and a worker is a fresh interpreter that never imports the driver's main module.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import pickle
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import psutil

from verl.utils.child_process import ending, start_child
from verl.workers.reward.function import RewardFunctionError
from verl.workers.reward.worker import NOBODY, SLOT, Setup

_LOG = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Limit for a worker to import the reward function."""
RECEIVE_SECONDS = 60.0
"""Limit for a worker to receive samples and import their scorers."""
ASYNC_GRACE_SECONDS = 0.5
"""A responsive event loop reports a timeout itself; a worker that stays silent this much longer is killed."""
ASYNC_IN_FLIGHT = 256
"""Limit of concurrent coroutines per worker; keeps connections below the usual limit of 1024 open files."""
FAILED_STARTS = 3
"""A replacement that ends while it imports the function is tried again this many times in a row."""
DEATHS_IN_A_ROW = 16
"""The pool gives up after this many ends of a worker without a single score in between."""
_GROUP_SECONDS = 0.01
_GROUP_SAMPLES = 64
_SOCKET_SECONDS = 10
_EXIT_SECONDS = 1.0


class RewardError(RuntimeError):
    """Scoring is impossible: every sample of a step failed, or the reward workers cannot be (re)started."""


class Outcome(NamedTuple):
    """One scored sample.

    `error` is None, "exception", "timeout" or "bad_return"; `detail` its traceback or reason. Without an error,
    `detail` is a note for the user on the extra values, or empty.
    """

    score: float
    extra: dict[str, Any]
    error: str | None
    detail: str
    seconds: float


Deliver = Callable[[Outcome | BaseException], None]


class _Job:
    __slots__ = ("again", "cancelled", "deliver", "payload")

    def __init__(self, payload: bytes, deliver: Deliver) -> None:
        self.payload = payload
        self.deliver = deliver
        self.cancelled = False
        self.again = False  # its first worker was stopped or killed


class _Worker:
    """One worker process and the driver's view of it; `running` keeps the order in which samples were sent."""

    def __init__(self, number: int, setup: bytes) -> None:
        self.number = number
        ours, theirs = socket.socketpair()
        with tempfile.TemporaryFile() as slot, theirs:
            slot.truncate(SLOT.size)
            self.slot = mmap.mmap(slot.fileno(), SLOT.size)
            SLOT.pack_into(self.slot, 0, NOBODY)
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _SOCKET_SECONDS, 0))
            self.process = start_child("verl.workers.reward.worker", number, fds=[theirs.fileno(), slot.fileno()])
        self.connection = Connection(ours.detach())
        self.ready = self.is_async = self.receiving = False
        self.running: dict[int, _Job] = {}
        self.heard = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died; the socket will report it
            self.connection.send_bytes(setup)

    def limit(self, timeout: float) -> float | None:
        """Return the seconds that this worker may stay silent now; None while it is idle."""
        if not self.ready:
            return START_SECONDS
        if not self.running:
            return None
        if self.receiving and not self.is_async:
            return RECEIVE_SECONDS
        return timeout + (ASYNC_GRACE_SECONDS if self.is_async else 0.0)

    def culprits(self) -> list[int]:
        """Return the samples to blame if this worker died or was killed: the one in computation, if known."""
        if not self.is_async:
            return list(self.running)[:1]
        (current,) = SLOT.unpack_from(self.slot, 0)
        return [current] if current in self.running else list(self.running)

    def is_stopped(self) -> bool:
        """Return True if a signal such as SIGSTOP stopped the process."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED
        return False

    def kill(self) -> int:
        """Kill the process and all processes that it started. Return its exit code."""
        self.process.kill_family()
        code = self.process.wait()
        self.connection.close()
        return code


class WorkerPool:
    """`num_workers` processes that score with the function of `setup`.

    Raises:
        RewardFunctionError: the function does not load.
    """

    def __init__(self, setup: Setup, num_workers: int) -> None:
        self._setup = setup
        self._pickled_setup = pickle.dumps(setup)
        self._num_workers = num_workers
        self._waiting: deque[_Job] = deque()
        self._numbers = itertools.count()
        self._workers: list[_Worker] = []
        self._mean_seconds: float | None = None
        self._failed_starts = self._deaths = 0
        self._broken: RewardError | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        # The kernel ties a worker to the thread that starts it, so this thread must live as long as the pool.
        self._thread = threading.Thread(target=self._run, name="reward-pool", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._broken is not None:
            broken = self._broken
            self.close()
            raise RewardFunctionError(str(broken))

    def submit(self, sample: tuple[Any, ...], deliver: Deliver) -> _Job:
        """Queue a sample. The pool's thread calls `deliver` once, with an Outcome or a RewardError.

        Set `cancelled` on the returned job to drop it.
        """
        job = _Job(pickle.dumps(sample), deliver)
        with self._lock:
            if self._broken is not None or self._closing:
                raise self._broken or RewardError("the reward workers are closed")
            self._waiting.append(job)
        self._wake()
        return job

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in tuple(self._workers)]

    def close(self) -> None:
        """End every worker process. Waiting samples get a RewardError."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
        self._wake()
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is already full of wake-ups
            os.write(self._wake_write, b"w")

    def _run(self) -> None:
        try:
            while not self._closing:
                if self._broken is None:
                    while len(self._workers) < self._num_workers:
                        free = set(range(self._num_workers)) - {worker.number for worker in self._workers}
                        self._workers.append(_Worker(min(free), self._pickled_setup))
                    self._dispatch()
                self._listen()
                self._enforce_limits()
        except BaseException as error:
            _LOG.exception("the reward pool's thread failed")
            self._break(f"the reward pool's thread failed: {error!r}")
            raise
        finally:
            self._shut_down()

    def _dispatch(self) -> None:
        ready = sorted((worker for worker in self._workers if worker.ready), key=lambda worker: len(worker.running))
        if not self._waiting or not ready:
            return
        share = -(-len(self._waiting) // len(ready))
        for worker in ready:
            if worker.is_async:
                size = min(share, ASYNC_IN_FLIGHT - len(worker.running))
            else:
                size = 0 if worker.running else min(share, self._group_size())
            if size > 0:
                self._send(worker, size)

    def _group_size(self) -> int:
        """Return the samples to send together: about `_GROUP_SECONDS` of work, and one if they are slow."""
        if self._mean_seconds is None:
            return 1
        return max(1, min(_GROUP_SAMPLES, int(_GROUP_SECONDS / max(self._mean_seconds, 1e-9))))

    def _send(self, worker: _Worker, size: int) -> None:
        batch: list[tuple[int, _Job]] = []
        while self._waiting and len(batch) < size:
            job = self._waiting.popleft()
            if not job.cancelled:
                number = next(self._numbers)
                batch.append((number, job))
        if not batch:
            return
        if not worker.running:
            worker.heard = time.monotonic()
        worker.running.update(batch)
        worker.receiving = True
        try:
            worker.connection.send([(number, job.payload) for number, job in batch])
        except OSError:  # it died, or has not read its socket for `_SOCKET_SECONDS`
            self._replace(worker, "exception", "the reward worker does not receive samples")

    def _listen(self) -> None:
        now = time.monotonic()
        ends = [
            worker.heard + limit for worker in self._workers if (limit := worker.limit(self._setup.timeout)) is not None
        ]
        readable = wait(
            [self._wake_read, *(worker.connection for worker in self._workers)],
            timeout=max(0.0, min(ends) - now) if ends else None,
        )
        if self._wake_read in readable:
            os.read(self._wake_read, 4096)
        for worker in [worker for worker in self._workers if worker.connection in readable]:
            self._receive(worker)

    def _receive(self, worker: _Worker) -> None:
        try:
            while True:
                self._handle(worker, worker.connection.recv())
                if not worker.connection.poll(0):
                    return
        except (EOFError, OSError):
            pass
        if worker not in self._workers:
            return  # a message of the worker ended it
        if worker.ready:
            self._replace(worker, "exception", "")
        else:
            code = self._drop(worker)
            self._failed_starts += 1
            if not self._started.is_set() or self._failed_starts > FAILED_STARTS:
                self._break(f"a reward worker ended ({ending(code)}) while loading {self._setup.path}")

    def _handle(self, worker: _Worker, message: tuple[Any, ...]) -> None:
        worker.heard = time.monotonic()
        kind, *rest = message
        if kind == "done":
            number, *outcome = rest
            result = Outcome(*outcome)
            mean = self._mean_seconds
            self._mean_seconds = result.seconds if mean is None else 0.9 * mean + 0.1 * result.seconds
            self._deaths = 0
            job = worker.running.pop(number)
            job.deliver(result)
        elif kind == "start":
            worker.receiving = False
        elif kind == "ready":
            worker.ready, (worker.is_async,) = True, rest
            self._failed_starts = 0
            self._started.set()
        else:
            self._drop(worker)
            self._break(rest[0])

    def _enforce_limits(self) -> None:
        for worker in tuple(self._workers):
            limit = worker.limit(self._setup.timeout)
            if limit is None or time.monotonic() - worker.heard < limit or worker.connection.poll(0):
                continue
            if worker.ready:
                self._replace(worker, "timeout", "")
            else:
                self._drop(worker)
                self._break(f"{self._setup.path} took more than {START_SECONDS:g} s to import")

    def _replace(self, worker: _Worker, error: str, detail: str) -> None:
        """Kill a worker. The sample in computation fails; its other samples return to the head of the queue.

        If the worker was stopped or killed, perhaps from outside, the sample is scored once more too.
        """
        seconds = time.monotonic() - worker.heard
        blamed = worker.culprits()
        stopped = worker.is_stopped()
        died = error == "exception" and not detail
        code = self._drop(worker)
        if error == "exception":
            detail = detail or f"the reward function ended its process ({ending(code)})"
        for number in blamed:
            job = worker.running[number]
            if (stopped or (died and code == -signal.SIGKILL)) and not job.again:
                job.again = True
                continue
            worker.running.pop(number).deliver(Outcome(0.0, {}, error, detail, seconds))
        with self._lock:
            self._waiting.extendleft(reversed(worker.running.values()))
        self._deaths += died
        if self._deaths >= DEATHS_IN_A_ROW:
            self._break(f"{self._deaths} reward workers ended in a row without a score; the last time: {detail}")

    def _drop(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _break(self, reason: str) -> None:
        """Stop scoring permanently and deliver the reason to all samples."""
        with self._lock:
            self._broken = self._broken or RewardError(reason)
            orphans = [*self._waiting, *(job for worker in self._workers for job in worker.running.values())]
            self._waiting.clear()
        for worker in self._workers:
            worker.running.clear()
        for job in orphans:
            job.deliver(self._broken)
        self._started.set()

    def _shut_down(self) -> None:
        """Let idle workers exit by themselves, so that the user's exit handlers run; kill the busy ones."""
        for worker in [worker for worker in self._workers if worker.running or not worker.ready]:
            for number in list(worker.running):
                worker.running.pop(number).deliver(RewardError("the reward workers are closed"))
            self._drop(worker)
        self._break("the reward workers are closed")
        deadline = time.monotonic() + _EXIT_SECONDS
        for worker in self._workers:
            with socket.socket(fileno=os.dup(worker.connection.fileno())) as end:
                end.shutdown(socket.SHUT_WR)
        for worker in tuple(self._workers):
            while wait([worker.connection], timeout=max(0.0, deadline - time.monotonic())):
                try:
                    worker.connection.recv_bytes()
                except (EOFError, OSError):
                    break
            self._drop(worker)
