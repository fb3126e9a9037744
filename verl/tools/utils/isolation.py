"""Run user functions outside the caller's event loop, with a time limit that also applies to blocking functions."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

# Seconds after which a shared event loop that does not react counts as blocked.
_BLOCKED_AFTER_S = 1.0
_NONE: Mapping[str, Any] = MappingProxyType({})


class CallTimeout(Exception):
    """A function exceeded its time limit; it may still be running."""


class CallFailed(Exception):
    """A function raised an error; the message is that error as `Type: text`."""


class IsolatedCalls:
    """Runs a plain function in a new thread, and all async functions on one shared event loop in another thread.

    Every thread is a daemon thread, so a function that hangs does not keep the process from exiting. If an async
    function blocks the shared loop, the other functions on it time out; later calls get a new loop.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(
        self,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = _NONE,
        *,
        timeout: float,
    ) -> Any:
        """Return `function(*args, **kwargs)`.

        Args:
            function: a plain or async function.
            args, kwargs: its arguments; a keyword may have any name.
            timeout: time limit in seconds.

        Raises:
            CallTimeout: the time limit was exceeded.
            CallFailed: the function raised anything, `SystemExit`, `KeyboardInterrupt` and `CancelledError` included.
        """
        loop = None
        if inspect.iscoroutinefunction(function):
            loop = self._shared_loop()
            future = asyncio.run_coroutine_threadsafe(_outcome_of(function, args, kwargs), loop)
        else:
            future = start_thread(_outcome, function, args, kwargs)
        waiting = asyncio.wrap_future(future)
        try:
            done, _ = await asyncio.wait({waiting}, timeout=timeout)
        finally:
            waiting.cancel()
        if not done:
            if loop is not None:
                await self._replace_if_blocked(loop)
            raise CallTimeout
        value, failure = waiting.result()
        if failure is not None:
            raise CallFailed(failure)
        return value

    def _shared_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # The process would join the threads of the default executor at exit.
            self._loop.set_default_executor(DaemonThreads())
            start_thread(_run_forever, self._loop)
        return self._loop

    async def _replace_if_blocked(self, loop: asyncio.AbstractEventLoop) -> None:
        reaction = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop))
        done, _ = await asyncio.wait({reaction}, timeout=_BLOCKED_AFTER_S)
        if not done and self._loop is loop:
            self._loop = None


def start_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Run `function` in a new daemon thread."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001  (passed to the waiting caller)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="verl-tool").start()
    return future


def _run_forever(loop: asyncio.AbstractEventLoop) -> None:
    while True:
        # A task of a user function that raises SystemExit or KeyboardInterrupt ends `run_forever`.
        with contextlib.suppress(BaseException):
            loop.run_forever()


class DaemonThreads(ThreadPoolExecutor):
    """An executor for `asyncio.to_thread` whose threads do not keep the process from exiting: each job has its own."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return start_thread(fn, *args, **kwargs)


# (value, error text). Not an exception: event loops give SystemExit and StopIteration a special meaning.
Outcome = tuple[Any, str | None]


def _outcome(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Outcome:
    try:
        value = function(*args, **kwargs)
        if inspect.isawaitable(value):
            value = asyncio.run(_await(value))
    except BaseException as error:  # noqa: BLE001  (a user function may raise anything)
        return None, _text(error)
    return value, None


async def _outcome_of(
    function: Callable[..., Awaitable[Any]], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Outcome:
    try:
        return await function(*args, **kwargs), None
    # A CancelledError of the function would look like a cancellation of the caller. After one of the caller itself,
    # nobody reads the outcome.
    except BaseException as error:  # noqa: BLE001  (a user function may raise anything)
        return None, _text(error)


async def _await(value: Awaitable[Any]) -> Any:
    return await value


def _text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  (the user's __str__ may raise anything)
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
