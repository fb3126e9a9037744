"""Seconds spent in the named stages of a step; the same readings of the clock are the stages' spans in the timeline."""

import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from verl.utils.timeline import own_track, record


@contextmanager
def marked_timer(name: str, timings: MutableMapping[str, float], **args: int) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `timings[name]`.

    A name used twice accumulates, so a stage may be entered once for each mini-batch. The time of a block that raises
    is counted too. `args` are shown beside the stage in the timeline, as for `add_stage`.

    Example:
        >>> timings = {}
        >>> with marked_timer("gen", timings):
        ...     generate()
        >>> timings["gen"]  # seconds
    """
    with own_track():
        start = time.monotonic_ns()
        try:
            yield
        finally:
            add_stage(name, timings, start, time.monotonic_ns(), **args)


def add_stage(
    name: str, timings: MutableMapping[str, float], start_ns: int, end_ns: int, *, overlaps: bool = False, **args: int
) -> None:
    """Add a stage that lasted from one reading of `time.monotonic_ns` to another to `timings[name]`, in seconds.

    Args:
        overlaps: it does not lie within, or around, the other stages of the calling thread or task.
        args: shown beside the stage in the timeline; with `step` it counts for that step, otherwise for the one in
            which it began.
    """
    timings[name] = timings.get(name, 0.0) + (end_ns - start_ns) / 1e9
    record(name, "stage", start_ns, end_ns, overlaps=overlaps, **args)
