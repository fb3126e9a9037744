"""Many small requests to a process over few remote calls.

    RequestChannel (asks)                          RequestDesk (answers, in an actor)
    request(...) --.
    request(...) --+-- take([...]) ------------->  one task for each
    request(...) --'
    awaits         <-- some_answers() -----------  waits for the first, brings whatever is there by then

A remote call costs about a millisecond of processor time on either side, a sample of a small model less. Requests of
one turn of the event loop travel together, and while answers travel the next ones gather.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

Request = tuple[int, tuple[Any, ...]]  # number, arguments
Answer = tuple[int, Any, Exception | None]  # number, result, error


class RequestChannel:
    """The asking end.

    Args:
        take: hands requests over; the remote `RequestDesk.take`.
        some_answers: waits for answers; the remote `RequestDesk.some_answers`.

    Whatever either of them raises is raised by every request that waits then.
    """

    def __init__(
        self, take: Callable[[Sequence[Request]], Awaitable[None]], some_answers: Callable[[], Awaitable[list[Answer]]]
    ):
        self._take, self._some_answers = take, some_answers
        self._numbers = itertools.count()
        self._unsent: list[Request] = []
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: asyncio.Task[None] | None = None

    async def request(self, *arguments: Any) -> Any:
        """The answer to one request, or the error it ended with."""
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._unsent.append((number, arguments))
        if len(self._unsent) == 1:
            _start(self._send(), self._tasks)
        if self._listening is None:
            self._listening = _start(self._listen(), self._tasks)
        return await answer

    async def _send(self) -> None:
        # As a task of its own it starts after those that are about to ask too.
        requests, self._unsent = self._unsent, []
        try:
            await self._take(requests)
        except Exception as error:  # noqa: BLE001  (raised where the answers are awaited)
            self._fail([number for number, _ in requests], error)

    async def _listen(self) -> None:
        try:
            while self._waiting:
                for number, result, error in await self._some_answers():
                    answer = self._waiting.pop(number, None)
                    if answer is None or answer.done():
                        continue
                    if error is None:
                        answer.set_result(result)
                    else:
                        answer.set_exception(error)
        except Exception as error:  # noqa: BLE001  (as above)
            self._fail(list(self._waiting), error)
        finally:
            self._listening = None

    def _fail(self, numbers: Sequence[int], error: BaseException) -> None:
        for number in numbers:
            answer = self._waiting.pop(number, None)
            if answer is not None and not answer.done():
                answer.set_exception(error)


class RequestDesk:
    """The answering end.

    Args:
        answer: the coroutine function that answers one request.
        kinds: errors that the asking end tells apart; a subclass arrives as the first that it is one of, any other
            error as RuntimeError.
    """

    def __init__(self, answer: Callable[..., Awaitable[Any]], kinds: Sequence[type[Exception]] = ()):
        self._answer, self._kinds = answer, tuple(kinds)
        self._answers: list[Answer] = []
        self._some = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, requests: Sequence[Request]) -> None:
        """Begin to answer."""
        for number, arguments in requests:
            _start(self._run(number, arguments), self._tasks)

    async def some_answers(self) -> list[Answer]:
        """All answers that are there, as (number of the request, result, error); waits for the first of them."""
        await self._some.wait()
        self._some.clear()
        answers, self._answers = self._answers, []
        return answers

    async def _run(self, number: int, arguments: tuple[Any, ...]) -> None:
        result, failed = None, None
        try:
            result = await self._answer(*arguments)
        except Exception as error:  # noqa: BLE001  (it is the answer)
            failed = self._plain(error)
        self._answers.append((number, result, failed))
        self._some.set()

    def _plain(self, error: Exception) -> Exception:
        # Some libraries' errors cannot be unpickled.
        for kind in self._kinds:
            if isinstance(error, kind):
                return kind(str(error))
        return RuntimeError(f"{type(error).__name__}: {error}")


def _start(coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Run it beside, held by `tasks` while it runs: the event loop itself holds its tasks weakly."""
    task = asyncio.create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
