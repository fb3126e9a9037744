"""Helpers for calls that run at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar, overload

A = TypeVar("A")
B = TypeVar("B")


@overload
async def gather_or_cancel(
    first: Awaitable[A], second: Awaitable[B], /, *, wait_for_cancelled: bool = False
) -> tuple[A, B]: ...


@overload
async def gather_or_cancel(*calls: Awaitable[A], wait_for_cancelled: bool = False) -> tuple[A, ...]: ...


async def gather_or_cancel(*calls: Awaitable[Any], wait_for_cancelled: bool = False) -> tuple[Any, ...]:
    """Await all calls at the same time and return their results in order.

    The first error cancels the other calls and is raised; so does a cancellation of the caller.

    Args:
        wait_for_cancelled: return only when the cancelled calls have ended. By default they end in the background, so
            that a call which ignores its cancellation does not delay the error.
    """
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return tuple(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        if wait_for_cancelled:
            await asyncio.gather(*tasks, return_exceptions=True)


async def gather_all(*calls: Awaitable[A]) -> list[A]:
    """Await all calls to their end, then return their results in order or raise the first error in that order."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    results = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


async def unless_failed(main: Awaitable[A], *guards: Awaitable[Any], patience: float = 30.0) -> A:
    """Return the result of `main`, or raise the error of the first guard that fails before.

    Args:
        main: is cancelled if a guard fails, or the caller is cancelled.
        guards: run until `main` ends; each may raise.
        patience: seconds that `main` may take to end after its cancellation; then it is left alone.
    """
    task = asyncio.ensure_future(main)
    watching = [asyncio.ensure_future(guard) for guard in guards]
    try:
        await asyncio.wait([task, *watching], return_when=asyncio.FIRST_COMPLETED)
        for guard in watching:
            if guard.done():
                guard.result()
        return await task
    finally:
        task.cancel()
        await asyncio.wait([task], timeout=patience)
        if task.done() and not task.cancelled():
            task.exception()  # otherwise asyncio logs that nobody asked for it
        await cancel_and_wait(watching)


async def cancel_and_wait(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended. Their errors are ignored."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
