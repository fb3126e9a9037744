"""Runs a user's functions off the caller's event loop, with a time limit that holds whatever they do."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# How long the loop of the async functions may take to react before it counts as blocked.
_PATIENCE = 1.0


class CallTimeout(Exception):
    """A function took longer than it may; it may still be running."""


class CallFailed(Exception):
    """A function raised; the message is its error, as `Type: text`."""


class IsolatedCalls:
    """A plain function runs in a thread of its own, an async one on an event loop that all async ones share.

    Every thread is a daemon: one that hangs does not keep the process from ending. An async function that blocks its
    loop makes the others on it wait until their time is up; from then on others get a new loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, function: Callable[..., Any], *args: Any, timeout: float, **kwargs: Any) -> Any:
        """What `function` returns.

        Args:
            timeout: seconds.

        Raises:
            CallTimeout: no answer by then.
            CallFailed: it raised, `SystemExit` included.
        """
        loop = None
        if inspect.iscoroutinefunction(function):
            loop = self._shared_loop()
            future = asyncio.run_coroutine_threadsafe(_outcome_of(function, *args, **kwargs), loop)
        else:
            future = start_thread(_outcome, function, *args, **kwargs)
        waiting = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=timeout)
        finally:
            waiting.cancel()
        if not done:
            if loop is not None:
                await self._give_up_if_blocked(loop)
            raise CallTimeout
        value, failure = waiting.result()
        if failure is not None:
            raise CallFailed(failure)
        return value

    def _shared_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # Its own would be joined when the process ends.
            self._loop.set_default_executor(_DaemonThreads())
            start_thread(self._loop.run_forever)
        return self._loop

    async def _give_up_if_blocked(self, loop: asyncio.AbstractEventLoop) -> None:
        sign = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop))
        done, _ = await asyncio.wait({sign}, timeout=_PATIENCE)
        if not done and self._loop is loop:
            self._loop = None


def start_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Run `function` in a new daemon thread."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  (handed to whoever waits)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="verl-tool").start()
    return future


class _DaemonThreads(ThreadPoolExecutor):
    """What `asyncio.to_thread` uses inside an async function."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return start_thread(fn, *args, **kwargs)


# Outcomes instead of exceptions: some, as SystemExit and StopIteration, mean something to the event loops in between.
Outcome = tuple[Any, str | None]


def _outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    try:
        value = function(*args, **kwargs)
        if inspect.isawaitable(value):
            value = asyncio.run(_await(value))
    except BaseException as error:  # noqa: BLE001  (whatever the user's function raises)
        return None, _text(error)
    return value, None


async def _outcome_of(function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Outcome:
    try:
        return await function(*args, **kwargs), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # noqa: BLE001  (whatever the user's function raises)
        return None, _text(error)


async def _await(value: Awaitable[Any]) -> Any:
    return await value


def _text(error: BaseException) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
