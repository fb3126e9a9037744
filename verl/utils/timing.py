"""Seconds of the named stages of a step. The spans of the timeline use the same clock readings."""

import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from verl.timeline.spans import own_track, record


@contextmanager
def marked_timer(name: str, timings: MutableMapping[str, float], **args: int) -> Iterator[None]:
    """Add the wall-clock seconds of the block to `timings[name]`.

    A repeated name accumulates, so a stage may be entered once per mini-batch. The time of a block that raises counts
    too. The timeline shows `args` with the stage, see `add_stage`.

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
            add_stage(name, timings, start, time.monotonic_ns(), overlaps=False, **args)


def add_stage(
    name: str, timings: MutableMapping[str, float], start_ns: int, end_ns: int, *, overlaps: bool = False, **args: int
) -> None:
    """Add the seconds between two readings of `time.monotonic_ns` to `timings[name]`.

    Args:
        overlaps: the stage does not nest with the other stages of the calling thread or task.
        args: shown with the stage in the timeline; with `step` the stage counts for that step, otherwise for the step
            in which it began.
    """
    timings[name] = timings.get(name, 0.0) + (end_ns - start_ns) / 1e9
    record(name, "stage", start_ns, end_ns, overlaps=overlaps, **args)
