"""The trainer's ranks as Ray actors, called together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError


class WorkerDied(RuntimeError):
    """A trainer process ended without saying why (out of memory, killed)."""


class WorkerGroup:
    """One actor per rank.

    Args:
        worker_class: a plain class; rank `r` is made with `worker_class(r, **arguments)`.
        options: Ray options for each rank.
        arguments: keyword arguments common to all ranks.
    """

    def __init__(self, worker_class: type, options: Sequence[dict[str, Any]], arguments: dict[str, Any]):
        actor_class = ray.remote(worker_class)
        self._actors = [actor_class.options(**option).remote(rank, **arguments) for rank, option in enumerate(options)]

    def __len__(self) -> int:
        return len(self._actors)

    async def all(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank; the results in rank order."""
        return await self._gather([getattr(actor, method).remote(*arguments) for actor in self._actors])

    async def each(self, method: str, per_rank: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call `method` on every rank with arguments of its own."""
        calls = [getattr(actor, method).remote(*a) for actor, a in zip(self._actors, per_rank, strict=True)]
        return await self._gather(calls)

    async def rank(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call `method` on one rank."""
        return (await self._gather([getattr(self._actors[rank], method).remote(*arguments)]))[0]

    async def _gather(self, calls: list[Any]) -> list[Any]:
        """The first error wins at once: other ranks may wait for the failed one in a collective, for ever."""
        tasks = [asyncio.ensure_future(_result(call)) for call in calls]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    def stop(self) -> None:
        """End every rank's process."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


async def _result(call: Any) -> Any:
    try:
        return await call
    except RayTaskError as error:
        if error.cause is None:
            raise
        raise error.cause from None
    except RayActorError as error:
        raise WorkerDied(f"a trainer process died: {error}") from error
