"""Calls of a user's reward manager, outside the driver's event loop and with a time limit per sample.

A thread cannot be killed, so a manager that hangs keeps its thread. These threads do not keep the driver alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any

from verl.workers.reward.worker import stepwise

_POLL_SECONDS = 0.05
_THREADS = min(32, (os.cpu_count() or 1) + 4)


class ManagerTimeoutError(Exception):
    """The manager did not return within its time limit."""


class _Stopwatch:
    """Seconds that a manager takes for one sample, without the time in which it waits for the scorer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._since: float | None = None
        self._started = False
        self._waits = 0

    def start(self) -> None:
        self._change(started=True)

    def seconds(self) -> float:
        with self._lock:
            return self._seconds + (0.0 if self._since is None else time.monotonic() - self._since)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._change(waits=1)
        try:
            yield
        finally:
            self._change(waits=-1)

    def _change(self, *, started: bool = False, waits: int = 0) -> None:
        with self._lock:
            now = time.monotonic()
            self._seconds += 0.0 if self._since is None else now - self._since
            self._started |= started
            self._waits += waits
            self._since = now if self._started and self._waits == 0 else None


_current: contextvars.ContextVar[_Stopwatch] = contextvars.ContextVar("stopwatch of a manager's call")


class _LoopThread:
    """An event loop in a thread of its own.

    Attributes:
        holder: the sample whose code holds the loop now.
        abandoned: one future per waiting caller, done once the loop is abandoned because it is blocked.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.holder: _Stopwatch | None = None
        self.abandoned: set[asyncio.Future[None]] = set()
        threading.Thread(target=self.loop.run_forever, name="reward-manager", daemon=True).start()


class ManagerCalls:
    """Calls of one manager.

    Args:
        timeout: limit in seconds per sample, from the start of its call, without the time in `waiting`.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._active: set[_Stopwatch] = set()
        self._thread: _LoopThread | None = None
        self._slots = asyncio.Semaphore(_THREADS)

    async def run_coroutine(self, function: Callable[[], Awaitable[Any]]) -> Any:
        """Return `await function()`, which runs on one event loop together with other samples.

        A sample that blocks this loop gets a time-out, and the other samples are repeated on another loop.

        Raises:
            ManagerTimeoutError: it took longer than the limit.
        """
        while True:
            if self._thread is None:
                self._thread = _LoopThread()
            thread, watch = self._thread, _Stopwatch()
            call = asyncio.run_coroutine_threadsafe(_on_loop(function, thread, watch), thread.loop)
            future, abandoned = asyncio.wrap_future(call), asyncio.get_running_loop().create_future()
            thread.abandoned.add(abandoned)
            try:
                # While another sample holds the loop, that one is to blame.
                while not await self._is_over(watch, future, abandoned):
                    if thread.holder in (watch, None):
                        break
                if future.done():
                    return future.result()
                if not abandoned.done():
                    if thread.holder is watch:
                        self._abandon(thread)
                    raise ManagerTimeoutError
            finally:
                thread.abandoned.discard(abandoned)
                future.cancel()

    async def run_in_thread(self, function: Callable[[], Any]) -> Any:
        """Return `function()`, which runs in a thread of its own.

        Raises:
            ManagerTimeoutError: it took longer than the limit.
        """
        async with self._slots:
            watch, done = _Stopwatch(), Future[tuple[Any, BaseException | None]]()
            threading.Thread(
                target=contextvars.copy_context().run, args=(_in_thread, function, watch, done), daemon=True
            ).start()
            future = asyncio.wrap_future(done)
            if not await self._is_over(watch, future):
                future.cancel()
                raise ManagerTimeoutError
            value, error = future.result()
            if error is not None:
                raise error
            return value

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Stop the clock of the sample whose call this is, or of all samples if this is a thread of the manager."""
        watch = _current.get(None)
        with contextlib.ExitStack() as stack:
            for paused in tuple(self._active) if watch is None else (watch,):
                stack.enter_context(paused.paused())
            yield

    def _abandon(self, thread: _LoopThread) -> None:
        self._thread = None
        for caller in thread.abandoned:
            caller.set_result(None)

    async def _is_over(self, watch: _Stopwatch, *futures: asyncio.Future[Any]) -> bool:
        """Wait until one of the futures is done or the time is up; return False in the second case."""
        self._active.add(watch)
        try:
            while True:
                left = self._timeout - watch.seconds()
                done, _ = await asyncio.wait(
                    futures, timeout=max(left, _POLL_SECONDS), return_when=asyncio.FIRST_COMPLETED
                )
                if done or watch.seconds() >= self._timeout:
                    return bool(done)
        finally:
            self._active.discard(watch)


async def _on_loop(function: Callable[[], Awaitable[Any]], thread: _LoopThread, watch: _Stopwatch) -> Any:
    def mark(running: bool) -> None:
        thread.holder = watch if running else None

    async def call() -> Any:
        return await function()

    _current.set(watch)
    watch.start()
    try:
        return await stepwise(call(), mark)
    except (SystemExit, KeyboardInterrupt) as error:  # it would end the loop, and no other sample would return
        raise _plain_error(error) from error


def _in_thread(function: Callable[[], Any], watch: _Stopwatch, done: Future[tuple[Any, BaseException | None]]) -> None:
    outcome: tuple[Any, BaseException | None]
    _current.set(watch)
    watch.start()
    try:
        outcome = function(), None
    except Exception as error:  # noqa: BLE001  (the caller raises it)
        outcome = None, error
    except BaseException as error:  # noqa: BLE001  (sys.exit() in a user's code is an error of the sample)
        outcome = None, _plain_error(error)
    done.set_result(outcome)


def _plain_error(error: BaseException) -> Exception:
    return RuntimeError(f"the reward manager raised {type(error).__name__}({error})")
