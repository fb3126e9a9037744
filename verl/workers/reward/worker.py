"""Reward worker process: receives samples over a socket, scores them, and sends each result as soon as it is ready.

`pool.py` starts it as a fresh interpreter, without the driver's threads and imports. Everything that a user's function
can do to a process (hang, crash, exit, fill memory) happens here and not in the driver.

Messages in: first `Setup`, then lists of (id, pickled sample). Messages out, as tuples: ("ready", is_async) or
("failed", text) once; ("start",) when a list has been received; ("done", id, score, extra, error, detail, seconds),
where `detail` is the reason of the error, or without an error a note on extra values.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import mmap
import os
import pickle
import struct
import threading
import time
import traceback
import types
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from verl.timeline.spans import Timeline, join_timeline, span, spanned
from verl.utils.child_process import end_with_parent
from verl.utils.heartbeat import Beacon, send_heartbeats
from verl.workers.reward.function import (
    ARGUMENTS,
    MODEL_ARGUMENTS,
    BadReturnError,
    RewardFunctionError,
    ScoreFunction,
    load_function,
    read_return,
)

MAX_EXTRA_BYTES = 16 * 2**20
_DETAIL_CHARACTERS = 8000
SLOT = struct.Struct("q")
NOBODY = -1


@dataclass(frozen=True)
class RewardModelAccess:
    """The reward model of a run: the address of its server (`host:port`), and the directory of its tokenizer."""

    address: str
    path: str


@dataclass(frozen=True)
class Setup:
    """Settings of a worker.

    Attributes:
        path, name, reward_kwargs: the user's function; `path` is None without one.
        timeout: seconds per sample.
        data_sources: built-in scorers to import at the start.
        timeline: argument of `join_timeline`.
        beacon: argument of `send_heartbeats`.
        reward_model: the reward model, which scores the samples without a function of the user; None without one.
    """

    path: str | None
    name: str
    reward_kwargs: dict[str, Any]
    timeout: float
    data_sources: tuple[str, ...] = ()
    timeline: Timeline | None = None
    beacon: Beacon | None = None
    reward_model: RewardModelAccess | None = None

    @property
    def scored_by_model(self) -> bool:
        """True if the reward model scores the samples; a sample then has `raw_prompt` as its fifth argument."""
        return self.reward_model is not None and self.path is None


def main(number: int, socket_fd: int, slot_fd: int, parent_pid: int) -> None:
    """Serve until the driver closes its end of the socket or dies."""
    os.set_inheritable(socket_fd, False)
    os.set_inheritable(slot_fd, False)
    end_with_parent(parent_pid)
    connection = Connection(socket_fd)
    slot = mmap.mmap(slot_fd, SLOT.size)
    try:
        setup = connection.recv()
    except EOFError:
        return
    send_heartbeats(setup.beacon, f"reward worker {number}")
    join_timeline(setup.timeline, f"reward worker {number}")
    try:
        function = _load(setup)
        _prepare(function, setup.data_sources)
    except Exception as error:  # noqa: BLE001 - the driver raises it with its text
        connection.send(("failed", str(error)))
        return
    connection.send(("ready", function.is_async))
    try:
        if function.is_async:
            asyncio.run(_AsyncServer(connection, function, setup.timeout, slot).serve())
        else:
            _serve_sync(connection, function)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the driver is gone or has closed the pool


def _load(setup: Setup) -> ScoreFunction:
    if (model := setup.reward_model) is None:
        return load_function(setup.path, setup.name, setup.reward_kwargs)
    from verl.utils.tokenizer import hf_tokenizer

    try:
        tokenizer = hf_tokenizer(model.path)
    except (ValueError, OSError) as error:
        raise RewardFunctionError(f"reward.reward_model.model_path: {error}") from error
    if setup.scored_by_model:
        from verl.utils.reward_score.reward_model import RewardModelScorer

        return ScoreFunction(RewardModelScorer(model.address, model.path, tokenizer), is_async=True)
    given = dict(zip(MODEL_ARGUMENTS, (model.address, tokenizer), strict=True))
    return load_function(setup.path, setup.name, setup.reward_kwargs, given)


def _prepare(function: ScoreFunction, data_sources: Iterable[str]) -> None:
    """Import the scorers of these sources. Raise the scorer's error for a source without a scorer."""
    if function.prepare is None:
        return
    for data_source in data_sources:
        function.prepare(data_source)


def _serve_sync(connection: Connection, function: ScoreFunction) -> None:
    while True:
        batch = connection.recv()
        if function.prepare is not None:
            # A source that cannot be prepared raises when its sample is scored.
            with contextlib.suppress(Exception):
                _prepare(function, {pickle.loads(payload)[0] for _, payload in batch})
        connection.send(("start",))
        for number, payload in batch:
            begin = time.perf_counter()
            with span("score"):
                outcome = score_one(function, payload)
            send_done(connection, number, outcome, time.perf_counter() - begin)


Outcome = tuple[float, dict[str, Any], str | None, str]


def score_one(function: ScoreFunction, payload: bytes) -> Outcome:
    """Score one pickled sample. Any failure of the function becomes an error of this sample."""
    try:
        value = function.call(**_arguments(payload))
        if inspect.isawaitable(value):  # a plain function that returns a coroutine
            value = asyncio.run(_finish(value))
        return _scored(value)
    except BaseException as error:  # noqa: BLE001 - sys.exit() in a user's function is an error of the sample too
        return _failure(error)


def _scored(value: Any) -> Outcome:
    score, extra, note = read_return(value)
    return score, extra, None, note


async def _finish(value: Awaitable[Any]) -> Any:
    return await value


def _arguments(payload: bytes) -> dict[str, Any]:
    values = pickle.loads(payload)
    return dict(zip((*ARGUMENTS, "raw_prompt")[: len(values)], values, strict=True))


def _failure(error: BaseException) -> Outcome:
    if isinstance(error, BadReturnError):
        return 0.0, {}, "bad_return", str(error)
    # The first two frames belong to this file and the wrapper; the user needs only their own.
    trace = error.__traceback__
    for _ in range(2):
        trace = trace.tb_next if trace is not None and trace.tb_next is not None else trace
    text = "".join(traceback.format_exception(type(error), error, trace))
    return 0.0, {}, "exception", text[-_DETAIL_CHARACTERS:]


def send_done(connection: Connection, number: int, outcome: Outcome, seconds: float) -> None:
    """Send one result. Of more than `MAX_EXTRA_BYTES` of extra values the largest are dropped, because all are kept."""
    message = pickle.dumps(("done", number, *outcome, seconds))
    if len(message) > MAX_EXTRA_BYTES:
        message = pickle.dumps(("done", number, *_without_largest(outcome, len(message)), seconds))
    connection.send_bytes(message)


def _without_largest(outcome: Outcome, size: int) -> Outcome:
    score, extra, error, detail = outcome
    sizes = {name: len(pickle.dumps(value)) for name, value in extra.items()}
    dropped = []
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if size <= MAX_EXTRA_BYTES:
            break
        dropped.append(name)
        size -= sizes[name]
    note = (
        f"the reward function returned more than {MAX_EXTRA_BYTES // 2**20} MiB of extra values for a sample; dropped: "
        f"{', '.join(dropped)}"
    )
    kept = {name: value for name, value in extra.items() if name not in dropped}
    return score, kept, error, "; ".join(filter(None, (detail, note)))


class _AsyncServer:
    """Scores with an async function: every sample received is a task on this process's event loop."""

    def __init__(self, connection: Connection, function: ScoreFunction, timeout: float, slot: mmap.mmap) -> None:
        self._connection = connection
        self._function = function
        self._timeout = timeout
        self._slot = slot
        self._tasks: set[asyncio.Task] = set()

    async def serve(self) -> None:
        """Run until the driver closes the socket."""
        SLOT.pack_into(self._slot, 0, NOBODY)
        loop = asyncio.get_running_loop()
        closed = loop.create_future()

        def receive() -> None:
            # In a thread, so that the socket is read (and the driver is not blocked) while a coroutine blocks the loop.
            while True:
                try:
                    batch = self._connection.recv()
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(closed.set_result, None)
                    return
                loop.call_soon_threadsafe(self._begin, batch)

        threading.Thread(target=receive, name="reward-receive", daemon=True).start()
        await closed
        for task in tuple(self._tasks):
            task.cancel()

    def _begin(self, batch: list[tuple[int, bytes]]) -> None:
        self._connection.send(("start",))
        for number, payload in batch:
            task = asyncio.get_running_loop().create_task(self._score(number, payload))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @spanned("score", "reward", overlaps=True)
    async def _score(self, number: int, payload: bytes) -> None:
        loop = asyncio.get_running_loop()
        begin = time.perf_counter()
        done = False

        def finish(outcome: Outcome) -> None:
            nonlocal done
            if not done:
                done = True
                send_done(self._connection, number, outcome, time.perf_counter() - begin)

        task = asyncio.current_task()
        assert task is not None

        def expire() -> None:
            # Send the result at once: a coroutine that ignores its cancellation would delay it.
            finish((0.0, {}, "timeout", ""))
            task.cancel()

        timer = loop.call_later(self._timeout, expire)
        try:
            value = await stepwise(self._function.call(**_arguments(payload)), self._mark(number))
            finish(_scored(value))
        except asyncio.CancelledError as error:
            finish(_failure(error))
        except BaseException as error:  # noqa: BLE001 - sys.exit() in a user's function is an error of the sample too
            finish(_failure(error))
        finally:
            timer.cancel()

    def _mark(self, number: int) -> Callable[[bool], None]:
        def mark(running: bool) -> None:
            SLOT.pack_into(self._slot, 0, number if running else NOBODY)

        return mark


@types.coroutine
def stepwise(awaitable: Awaitable[Any], mark: Callable[[bool], None]) -> Generator[Any, Any, Any]:
    """Await `awaitable`, and call `mark(True)` while its code holds the event loop, `mark(False)` otherwise.

    The mark tells another thread or process which coroutine blocks the loop.
    """
    steps = awaitable.__await__()
    send: Callable[..., Any] = steps.send
    argument: Any = None
    while True:
        mark(True)
        try:
            waiting = send(argument)
        except StopIteration as stop:
            return stop.value
        finally:
            mark(False)
        try:
            send, argument = steps.send, (yield waiting)
        except BaseException as error:  # noqa: BLE001 - is thrown into the user's coroutine, as await does
            send, argument = steps.throw, error
