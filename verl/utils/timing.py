"""Seconds spent in the named stages of a step."""

import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager


@contextmanager
def marked_timer(name: str, timings: MutableMapping[str, float]) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `timings[name]`.

    A name used twice accumulates, so a stage may be entered once for each mini-batch. The time of a block that raises
    is counted too.

    Example:
        >>> timings = {}
        >>> with marked_timer("gen", timings):
        ...     generate()
        >>> timings["gen"]  # seconds
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
