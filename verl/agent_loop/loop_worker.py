"""Agent-loop worker process: runs agent loops and tools; requests to the replicas go through the driver.

`loop_pool.py` starts it as a fresh interpreter. The driver keeps the routing of requests, the rewards and the batch.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import socket
from dataclasses import fields
from typing import Any, cast

from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, LoopFactory
from verl.agent_loop.loop_messages import Ask, Cancel, Done, Failed, Ready, Run, Setup, encode, failed, receive
from verl.agent_loop.loops_file import register_from_file
from verl.extension.external import import_external
from verl.timeline.spans import join_timeline
from verl.tools.utils.isolation import DaemonThreads
from verl.utils.asyncio_utils import cancel_and_wait
from verl.utils.child_process import end_with_parent
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.types import TokenOutput


def main(number: int, socket_fd: int, parent_pid: int) -> None:
    """Serve until the driver closes its end of the socket or dies."""
    os.set_inheritable(socket_fd, False)
    end_with_parent(parent_pid)
    asyncio.run(_serve(number, socket.socket(fileno=socket_fd)))


async def _serve(number: int, connection: socket.socket) -> None:
    # Threads of loops and tools may hang, and asyncio waits for those of its own executor.
    asyncio.get_running_loop().set_default_executor(DaemonThreads())
    reader, writer = await asyncio.open_unix_connection(sock=connection)
    try:
        setup: Setup = await receive(reader)
    except asyncio.IncompleteReadError:
        return
    join_timeline(setup.timeline, f"agent loop worker {number}")
    try:
        server = _Server(setup, writer)
    except Exception as error:  # noqa: BLE001  (the driver raises it)
        writer.write(encode(failed(-1, error)))
        await writer.drain()
        return
    writer.write(encode(Ready()))
    try:
        while True:
            server.on_message(await receive(reader))
    except (asyncio.IncompleteReadError, ConnectionError):
        await server.stop()


class _Client:
    """The replicas, for agent loops: `generate` is that of the driver's `LLMServerClient`."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self.waiting: dict[int, asyncio.Future[TokenOutput]] = {}

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], *, session: str | None = None
    ) -> TokenOutput:
        """Generate one response; see `LLMServerClient.generate`."""
        number = next(self._numbers)
        future = self.waiting[number] = asyncio.get_running_loop().create_future()
        self._writer.write(encode(Ask(number, list(prompt_ids), sampling_params, session)))
        try:
            return await future
        except asyncio.CancelledError:
            self._writer.write(encode(Cancel(number)))
            raise
        finally:
            del self.waiting[number]


class _Server:
    """Runs the loops of the driver's messages.

    Raises:
        ValueError: as `SampleGenerator`.
    """

    def __init__(self, setup: Setup, writer: asyncio.StreamWriter) -> None:
        config = setup.config
        model = config.actor_rollout_ref.model
        assert model.path is not None
        import_external(model.external_lib or ())
        agent = config.actor_rollout_ref.rollout.agent
        if agent.agent_loop_config_path is not None:
            register_from_file(agent.agent_loop_config_path)
        tokenizer = hf_tokenizer(model.tokenizer_path or model.path, trust_remote_code=model.trust_remote_code)
        self._writer, self._client = writer, _Client(writer)
        self._loops = LoopFactory(cast(LLMServerClient, self._client), tokenizer, config)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def on_message(self, message: Run | Cancel | Done | Failed) -> None:
        """Start or cancel a loop, or pass a response on."""
        match message:
            case Run():
                self._tasks[message.number] = asyncio.create_task(self._run(message))
            case Cancel():
                if (task := self._tasks.get(message.number)) is not None:
                    task.cancel()
            case Done() | Failed():
                waiting = self._client.waiting.get(message.number)
                if waiting is None or waiting.done():
                    return
                if isinstance(message, Done):
                    waiting.set_result(message.value)
                else:
                    waiting.set_exception(message.exception)

    async def _run(self, message: Run) -> None:
        reply: Done | Failed
        try:
            loop: AgentLoopBase = self._loops.make(message.name)
            output = await loop.run(message.sampling_params, **message.row)
            # Without a subclass of the user, which the driver may not be able to import.
            plain = AgentLoopOutput(**{field.name: getattr(output, field.name) for field in fields(AgentLoopOutput)})
            reply = Done(message.number, pickle.dumps(plain))
        except Exception as error:  # noqa: BLE001  (the driver raises it)
            reply = failed(message.number, error)
        finally:
            del self._tasks[message.number]
        self._writer.write(encode(reply))
        await self._writer.drain()

    async def stop(self) -> None:
        """Cancel the loops."""
        await cancel_and_wait(list(self._tasks.values()))
