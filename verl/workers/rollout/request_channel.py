"""Many small requests to another process over few remote calls.

    RequestChannel (client)                        RequestDesk (server, in an actor)
    request(...) --.
    request(...) --+-- submit([...]) ----------->  one task per request
    request(...) --'
    awaits         <-- next_responses() ---------  waits for the first response, returns all available ones

A remote call costs about a millisecond of processor time on each side; a sample of a small model costs less. Requests
of one turn of the event loop are sent together, and responses accumulate while others are in transit.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

Request = tuple[int, tuple[Any, ...]]  # number, arguments
Response = tuple[int, Any, Exception | None]  # number, result, error


class RequestChannel:
    """The client side.

    Args:
        submit: sends requests; the remote `RequestDesk.submit`.
        next_responses: waits for responses; the remote `RequestDesk.next_responses`.

    An exception of either of them is raised by every waiting request.
    """

    def __init__(
        self,
        submit: Callable[[Sequence[Request]], Awaitable[None]],
        next_responses: Callable[[], Awaitable[list[Response]]],
    ):
        self._submit, self._next_responses = submit, next_responses
        self._numbers = itertools.count()
        self._unsent: list[Request] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None

    async def request(self, *arguments: Any) -> Any:
        """Return the response to one request, or raise its error."""
        number = next(self._numbers)
        response = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._unsent.append((number, arguments))
        if len(self._unsent) == 1:
            _start(self._send(), self._tasks)
        if self._listening is None:
            self._listening = _start(self._listen(), self._tasks)
        return await response

    async def _send(self) -> None:
        # This runs as a separate task, so it starts after tasks that are about to send a request too.
        requests, self._unsent = self._unsent, []
        try:
            await self._submit(requests)
        except Exception as error:  # noqa: BLE001  (raised where the responses are awaited)
            self._fail([number for number, _ in requests], error)

    async def _listen(self) -> None:
        try:
            while self._waiting:
                for number, result, error in await self._next_responses():
                    response = self._waiting.pop(number, None)
                    if response is None or response.done():
                        continue
                    if error is None:
                        response.set_result(result)
                    else:
                        response.set_exception(error)
        except Exception as error:  # noqa: BLE001  (as above)
            self._fail(list(self._waiting), error)
        finally:
            self._listening = None

    def _fail(self, numbers: Sequence[int], error: BaseException) -> None:
        for number in numbers:
            response = self._waiting.pop(number, None)
            if response is not None and not response.done():
                response.set_exception(error)


class RequestDesk:
    """The server side.

    Args:
        handler: coroutine function that handles one request.
        kinds: exception types that the client distinguishes. A subclass arrives as the first matching type, any other
            exception as RuntimeError.
    """

    def __init__(self, handler: Callable[..., Awaitable[Any]], kinds: Sequence[type[Exception]] = ()):
        self._handler, self._kinds = handler, tuple(kinds)
        self._responses: list[Response] = []
        self._available = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(self, requests: Sequence[Request]) -> None:
        """Start to handle requests."""
        for number, arguments in requests:
            _start(self._run(number, arguments), self._tasks)

    async def next_responses(self) -> list[Response]:
        """Wait for a response, then return all available ones as (number of the request, result, error)."""
        await self._available.wait()
        self._available.clear()
        responses, self._responses = self._responses, []
        return responses

    async def _run(self, number: int, arguments: tuple[Any, ...]) -> None:
        result, failed = None, None
        try:
            result = await self._handler(*arguments)
        except Exception as error:  # noqa: BLE001  (the error is the response)
            failed = self._plain(error)
        self._responses.append((number, result, failed))
        self._available.set()

    def _plain(self, error: Exception) -> Exception:
        # Exceptions of some libraries cannot be unpickled.
        for kind in self._kinds:
            if isinstance(error, kind):
                return kind(str(error))
        return RuntimeError(f"{type(error).__name__}: {error}")


def _start(coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Start a task and keep a reference in `tasks` while it runs: the event loop holds only weak references."""
    task = asyncio.create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
