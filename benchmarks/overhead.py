"""Measure the overhead of a GRPO step: the share of its time in which no engine and no trainer rank computes.

    python benchmarks/overhead.py [--sizes 135M 0.8M] [--lengths equal ragged] [--steps 6] [--write DOCUMENT]

Runs `python3 -m verl.trainer.main_ppo` on the loads of `grpo_step.py`, with `trainer.timeline`. Overhead is the part of
a step outside the engine's forward passes and the trainer's forward, backward and optimizer passes (concurrent
processes count once): requests, bookkeeping of the sampling, rewards, batches, advantages, weight update, logs. The
table shows the overhead by stage of the driver. The first two steps warm up and do not count.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import machine
import models
import runs
import tables
from grpo_step import WARM_UP, add_load_options, chosen_loads

from verl.timeline.reader import Event, StepShares, covered, read_events, step_shares, step_windows
from verl.timeline.spans import close_timeline, open_timeline, span

TARGET = 0.05
_COMPUTING = ("engine", "train")


def overhead_by_stage(events: Sequence[Event]) -> dict[int, dict[str, float]]:
    """Return, by step, the share of the step's time in which each stage of the driver runs and no process computes.

    `between` is the time outside all stages. The stage `step`, which contains the others, is left out.
    """
    spans = [event for event in events if event["ph"] == "X"]
    busy = [_interval(event) for event in spans if event["cat"] in _COMPUTING]
    stages = [event for event in spans if event["cat"] == "stage" and event["name"] != "step"]
    shares: dict[int, dict[str, float]] = {}
    for step, (begin, end) in step_windows(events).items():
        inside = [event for event in stages if begin <= event["ts"] < end]
        found = shares[step] = {}
        for event in inside:
            start, stop = _interval(event)
            idle = (stop - start - covered(busy, start, stop)) / (end - begin)
            found[event["name"]] = found.get(event["name"], 0.0) + idle
        accounted = [*busy, *map(_interval, inside)]
        found["between"] = (end - begin - covered(accounted, begin, end)) / (end - begin)
    return shares


def _interval(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def measure(size: str, load: runs.Load, steps: int, work: Path) -> tuple[list[StepShares], dict[str, float]]:
    """Run a load; return the shares of each step after the warm-up, and the median overhead by stage."""
    trace = work / "timeline.json"
    config = runs.keys(
        load, models.write_model(size, work / "model"), work / "run", WARM_UP + steps, {"trainer.timeline": trace}
    )
    runs.finish(runs.start(config), config)
    events = read_events(trace)
    shares = [share for step, share in sorted(step_shares(events).items()) if step > WARM_UP]
    by_stage = [stages for step, stages in overhead_by_stage(events).items() if step > WARM_UP]
    names = dict.fromkeys(name for stages in by_stage for name in stages)
    medians = {name: statistics.median(stages.get(name, 0.0) for stages in by_stage) for name in names}
    return shares, medians


def span_seconds(count: int = 20_000) -> tuple[float, float]:
    """Return the seconds of a recorded span, and of a span in a run without a timeline."""

    def seconds_per_span() -> float:
        started = time.perf_counter()
        for _ in range(count):
            with span("empty"):
                pass
        return (time.perf_counter() - started) / count

    unrecorded = seconds_per_span()
    with tempfile.TemporaryDirectory() as work:
        open_timeline(Path(work) / "timeline.json")
        try:
            return seconds_per_span(), unrecorded
        finally:
            close_timeline()


def row(size: str, lengths: str, load: runs.Load, shares: list[StepShares], stages: dict[str, float]) -> list[str]:
    """Row of the table."""
    overheads = [share.overhead for share in shares]
    largest = sorted(stages.items(), key=lambda item: -item[1])
    return [
        size,
        lengths,
        f"{load.samples} samples, {load.tokens} tokens",
        f"{statistics.median(share.seconds for share in shares):.2f}",
        f"{statistics.median(share.engine for share in shares):.1%}",
        f"{statistics.median(share.train for share in shares):.1%}",
        f"**{statistics.median(overheads):.1%}** ({min(overheads):.1%} to {max(overheads):.1%})",
        ", ".join(f"{name} {share:.1%}" for name, share in largest if share >= 0.001),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_load_options(parser)
    parser.add_argument("--steps", type=int, default=6, help=f"measured steps, after {WARM_UP} warm-up steps")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    rows = []
    for size, lengths, load in chosen_loads(options):
        with tempfile.TemporaryDirectory() as work:
            rows.append(row(size, lengths, load, *measure(size, load, options.steps, Path(work))))
        print(*rows[-1], sep="  ", flush=True)
    head = ["model", "lengths", "work per step", "s", "engine", "trainer", "overhead", "overhead by stage"]
    recorded, unrecorded = (1e6 * seconds for seconds in span_seconds())
    text = (
        f"{tables.caption('make bench-overhead')} Median of {options.steps} steps; target for 135M: at most "
        f"{TARGET:.0%}.\n\n{tables.markdown(head, rows)}\n\nA span of the timeline costs {recorded:.1f} us, and "
        f"{unrecorded:.2f} us in a run without one."
    )
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "overhead", text)


if __name__ == "__main__":
    main()
