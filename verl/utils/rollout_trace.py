"""`rollout_trace_op`: a span in the timeline of the run for each call of a method of an agent loop or a tool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from verl.timeline.spans import spanned

F = TypeVar("F", bound=Callable[..., Any])


def rollout_trace_op(func: F) -> F:
    """Decorate a method, plain or `async def`: each call becomes a span `Class.method` in the timeline.

    Upstream verl sends arguments and results to a tracing service; this is not supported here.
    """
    return spanned(func.__qualname__, "agent", overlaps=True)(func)
