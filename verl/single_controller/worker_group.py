"""One actor per trainer rank, all called together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, TypeVarTuple

from verl.single_controller.actor import Actor
from verl.utils.asyncio_utils import gather_or_cancel

WorkerT_co = TypeVar("WorkerT_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class WorkerGroup(Generic[WorkerT_co]):
    """Ranks of one worker class.

    Methods are named by the class's function, for example `await group.all(TrainWorker.save_checkpoint, path)`. Every
    method raises as `Actor.call` does. The first error is raised at once: other ranks may wait for the failed rank in a
    collective operation forever.

    Args:
        worker_class: a plain class; rank `r` is constructed as `worker_class(r, *arguments, **keywords)`.
        options: Ray options of each rank.
        arguments, keywords: constructor arguments shared by all ranks.
    """

    def __init__(
        self,
        worker_class: Callable[Concatenate[int, P], WorkerT_co],
        options: Sequence[Mapping[str, Any]],
        *arguments: P.args,
        **keywords: P.kwargs,
    ):
        self._actors: list[Actor[WorkerT_co]] = [
            Actor(worker_class, option, rank, *arguments, **keywords) for rank, option in enumerate(options)
        ]
        self._lock = asyncio.Lock()
        self._limit: tuple[float, Callable[[str], None]] | None = None
        self._holds_lock: ContextVar[bool] = ContextVar("holds_lock", default=False)

    def __len__(self) -> int:
        return len(self._actors)

    async def all(
        self, method: Callable[Concatenate[WorkerT_co, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> list[R]:
        """Call `method` with the same arguments on every rank and return the results by rank."""
        async with self.exclusive():
            references = [actor.submit(method, *arguments, **keywords) for actor in self._actors]
            return await self._results(method.__name__, references)

    async def each(self, method: Callable[[WorkerT_co, *Ts], R], per_rank: Sequence[tuple[*Ts]]) -> list[R]:
        """Call `method` on every rank with that rank's arguments and return the results by rank."""
        async with self.exclusive():
            calls = zip(self._actors, per_rank, strict=True)
            references = [actor.submit(method, *arguments) for actor, arguments in calls]
            return await self._results(method.__name__, references)

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Keep calls of other tasks waiting, so that several calls in the block follow each other on every rank.

        Calls in the block, and in tasks that it creates, go through.
        """
        if self._holds_lock.get():
            yield
            return
        async with self._lock:
            token = self._holds_lock.set(True)
            try:
                yield
            finally:
                self._holds_lock.reset(token)

    async def rank(
        self, rank: int, method: Callable[Concatenate[WorkerT_co, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> R:
        """Call `method` on one rank."""
        call = asyncio.ensure_future(self._actors[rank].call(method, *arguments, **keywords))
        with self._limited(method.__name__, {rank: call}):
            (result,) = await gather_or_cancel(call)
        return result

    async def run(
        self, function: Callable[Concatenate[Any, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> list[R]:
        """Evaluate `function(worker, *arguments)` in every rank's process and return the results by rank."""
        references = [actor.submit_function(function, *arguments, **keywords) for actor in self._actors]
        return await self._results(function.__name__, references)

    def limit_calls(self, seconds: float, on_overdue: Callable[[str], None]) -> None:
        """Call `on_overdue` with a description of each call that takes longer than `seconds`; the call goes on."""
        self._limit = seconds, on_overdue

    async def _results(self, name: str, references: Sequence[Any]) -> list[Any]:
        pairs = zip(self._actors, references, strict=True)
        calls = [asyncio.ensure_future(actor.result(reference)) for actor, reference in pairs]
        with self._limited(name, dict(enumerate(calls))):
            return list(await gather_or_cancel(*calls))

    @contextmanager
    def _limited(self, name: str, calls: Mapping[int, asyncio.Future[Any]]) -> Iterator[None]:
        if self._limit is None:
            yield
            return
        seconds, on_overdue = self._limit

        def report() -> None:
            ranks = ", ".join(str(rank) for rank, call in calls.items() if not call.done())
            on_overdue(f"{name} has not ended after {seconds:g} s on trainer rank(s) {ranks}")

        timer = asyncio.get_running_loop().call_later(seconds, report)
        try:
            yield
        finally:
            timer.cancel()

    def stop(self) -> None:
        """End every rank's process."""
        for actor in self._actors:
            actor.kill()
        self._actors = []
