"""One actor per trainer rank, all called together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

    def __len__(self) -> int:
        return len(self._actors)

    async def all(
        self, method: Callable[Concatenate[WorkerT_co, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> list[R]:
        """Call `method` with the same arguments on every rank and return the results by rank."""
        return await self._results([actor.submit(method, *arguments, **keywords) for actor in self._actors])

    async def each(self, method: Callable[[WorkerT_co, *Ts], R], per_rank: Sequence[tuple[*Ts]]) -> list[R]:
        """Call `method` on every rank with that rank's arguments and return the results by rank."""
        calls = zip(self._actors, per_rank, strict=True)
        return await self._results([actor.submit(method, *arguments) for actor, arguments in calls])

    async def rank(
        self, rank: int, method: Callable[Concatenate[WorkerT_co, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> R:
        """Call `method` on one rank."""
        return await self._actors[rank].call(method, *arguments, **keywords)

    async def run(
        self, function: Callable[Concatenate[Any, P], R], *arguments: P.args, **keywords: P.kwargs
    ) -> list[R]:
        """Evaluate `function(worker, *arguments)` in every rank's process and return the results by rank."""
        return await self._results([actor.submit_function(function, *arguments, **keywords) for actor in self._actors])

    async def _results(self, references: Sequence[Any]) -> list[Any]:
        calls = zip(self._actors, references, strict=True)
        return list(await gather_or_cancel(*(actor.result(reference) for actor, reference in calls)))

    def stop(self) -> None:
        """End every rank's process."""
        for actor in self._actors:
            actor.kill()
        self._actors = []
