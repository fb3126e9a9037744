"""Processes that run agent loops for the driver (`rollout.agent.num_workers`).

    driver                                        worker
    LoopPool.run(name, sampling_params, row) ---> AgentLoopBase.run
    LLMServerClient.generate <------------------- client.generate, as often as the loop calls it
    AgentLoopOutput <----------------------------

Templates, parsing and tools run in the workers. The driver routes the requests, because it knows which replicas are
alive, busy and cut by an update; it also scores the samples. All samples of a prompt run in one worker, in their order,
so that objects which the loops of a class share (`AgentLoopBase.setup`) see them as in a single process.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import socket
import subprocess
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.loop_messages import Ask, Cancel, Done, Failed, Ready, Run, Setup, encode, failed, receive
from verl.config import PPOConfig
from verl.timeline.spans import current_timeline
from verl.utils.asyncio_utils import gather_or_cancel
from verl.utils.child_process import ending, start_child
from verl.workers.rollout.client import LLMServerClient

_KEY = "actor_rollout_ref.rollout.agent.num_workers"
_START_SECONDS = 300.0
_EXIT_SECONDS = 5.0


class LoopWorkerDied(RuntimeError):
    """A worker process ended while it ran agent loops: a tool called exit, or used up the memory."""


class LoopPool:
    """`num_workers` processes that run agent loops.

    Args:
        client: access to the replicas.
        config: the whole config.
    """

    def __init__(self, client: LLMServerClient, config: PPOConfig) -> None:
        count = config.actor_rollout_ref.rollout.agent.num_workers
        self._workers = [_Worker(number, client) for number in range(count)]
        self._finalizer = weakref.finalize(self, _end, self._workers)
        setup = encode(Setup(config, current_timeline()))
        for worker in self._workers:
            worker.send(setup)

    async def start(self) -> None:
        """Wait until all workers are ready.

        Raises:
            ValueError: the default agent loop is unknown or does not support the config, or the loops file is invalid.
            LoopWorkerDied: a worker ended during its start.
        """
        await gather_or_cancel(*(worker.connected() for worker in self._workers))

    async def run(self, name: str, sampling_params: dict[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        """Run the agent loop `name` for a row; see `AgentLoopBase.run`.

        Raises:
            LoopWorkerDied: the worker has ended.
            Exception: that of the loop.
        """
        worker = self._workers[zlib.crc32(str(row.get("uid", "")).encode()) % len(self._workers)]
        return await worker.run(name, sampling_params, row)

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the workers and all processes that they started; may be called twice."""
        self._finalizer()


def _end(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.hang_up()
    for worker in workers:
        worker.kill_after(_EXIT_SECONDS)


class _Worker:
    """One process, and the calls of both sides that wait for it."""

    def __init__(self, number: int, client: LLMServerClient) -> None:
        self._number, self._client = number, client
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = start_child("verl.agent_loop.loop_worker", number, fds=[theirs.fileno()])
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[AgentLoopOutput]] = {}
        self._requests: dict[int, asyncio.Task[None]] = {}
        self._connection: asyncio.Task[asyncio.StreamWriter] | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._ended: LoopWorkerDied | None = None

    def send(self, data: bytes) -> None:
        """Send the first message, before the event loop has the socket."""
        with contextlib.suppress(BrokenPipeError):  # it has died; `connected` reports it
            self._socket.sendall(data)

    async def connected(self) -> asyncio.StreamWriter:
        """Return the connection, as soon as the worker is ready.

        Raises:
            Exception: that of the worker's start.
        """
        if self._connection is None:
            self._connection = asyncio.ensure_future(self._connect())
        return await asyncio.shield(self._connection)

    async def run(self, name: str, sampling_params: dict[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        """Run a loop; see `LoopPool.run`."""
        writer = await self.connected()
        if self._ended is not None:
            raise self._ended
        number = next(self._numbers)
        try:
            message = encode(Run(number, name, sampling_params, row))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise TypeError(f"{_KEY}: a row cannot be sent to another process ({error}); use {_KEY}=0") from error
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        writer.write(message)
        try:
            return await future
        except asyncio.CancelledError:
            writer.write(encode(Cancel(number)))
            raise
        finally:
            del self._waiting[number]

    async def _connect(self) -> asyncio.StreamWriter:
        """Give the socket to the running event loop, and wait for the worker."""
        reader, writer = await asyncio.open_unix_connection(sock=self._socket)
        try:
            async with asyncio.timeout(_START_SECONDS):
                message: Ready | Failed = await receive(reader)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            raise self._death("during its start") from None
        if isinstance(message, Failed):
            raise message.exception
        self._receiver = asyncio.ensure_future(self._receive(reader, writer))
        return writer

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self._on_message(await receive(reader), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._ended = self._death("while it ran agent loops")
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(self._ended)
            for task in self._requests.values():
                task.cancel()
            writer.close()

    def _on_message(self, message: Ask | Cancel | Done | Failed, writer: asyncio.StreamWriter) -> None:
        match message:
            case Ask():
                self._requests[message.number] = asyncio.create_task(self._answer(message, writer))
            case Cancel():
                if (task := self._requests.get(message.number)) is not None:
                    task.cancel()
            case Done() | Failed():
                future = self._waiting.get(message.number)
                if future is None or future.done():
                    return
                try:
                    if isinstance(message, Failed):
                        raise message.exception
                    future.set_result(message.value)
                except Exception as error:  # noqa: BLE001  (the loop's own, or a value that cannot be read here)
                    future.set_exception(error)

    async def _answer(self, ask: Ask, writer: asyncio.StreamWriter) -> None:
        reply: Done | Failed
        try:
            response = await self._client.generate(ask.prompt_ids, ask.sampling_params, session=ask.session)
            reply = Done(ask.number, pickle.dumps(response))
        except Exception as error:  # noqa: BLE001  (the agent loop gets it)
            reply = failed(ask.number, error)
        finally:
            del self._requests[ask.number]
        writer.write(encode(reply))

    def _death(self, when: str) -> LoopWorkerDied:
        self.kill_after(_EXIT_SECONDS)
        code = self.process.returncode
        return LoopWorkerDied(
            f"agent loop worker {self._number} ended {when} ({ending(code)}); a loop or tool may have called exit or "
            f"used up the memory"
        )

    def hang_up(self) -> None:
        """Close the driver's direction of the connection: the worker cancels its loops and ends."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_WR)

    def kill_after(self, seconds: float) -> None:
        """Wait for the end of the process, then kill what is left of it and of its children."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.process.kill_family()
        self.process.wait()
