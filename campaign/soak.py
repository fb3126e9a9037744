"""`python -m campaign.soak`: a long run of a tiny model, and what grows in it.

Every step trains, sends the weights to the engine and saves a checkpoint. Memory, open files and threads of every
process, the names in shared memory and the seconds of a step are sampled; a straight line is fitted to each of them. It
has a trend if the line rises by more than three standard errors and by more than 2 % of the mean over the whole run.
Exit status: 1 with a trend.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tables

import campaign  # noqa: F401  (puts the fixtures and the tables on the path)
from campaign.faults.catalog import TITLES
from fixtures.training import TinyRun

WARM_UP = 0.2  # share of the samples at the beginning that is left out: caches fill
Samples = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Trend:
    """A line through samples.

    Attributes:
        mean: of the samples.
        slope, error: growth in 1,000 steps, and its standard error.
        rise: growth over all samples, as a share of the mean.
    """

    mean: float
    slope: float
    error: float
    rise: float

    @property
    def grows(self) -> bool:
        """Whether the line rises more than by chance."""
        return self.slope > 3 * self.error and self.rise > 0.02


def fit(samples: Sequence[tuple[float, float]]) -> Trend:
    """Fit a line to samples (step, value) by least squares."""
    steps, values = np.array(samples, dtype=float).T
    centered = steps - steps.mean()
    spread = float((centered**2).sum())
    slope = float((centered * values).sum()) / spread
    residuals = values - values.mean() - slope * centered
    error = float(np.sqrt((residuals**2).sum() / max(1, len(values) - 2) / spread))
    mean = float(values.mean())
    return Trend(mean, 1000 * slope, 1000 * error, slope * float(np.ptp(steps)) / mean if mean else 0.0)


def observe(pid: int) -> Iterator[tuple[str, float]]:
    """Yield the sizes of a run at this moment: (name, value)."""
    driver = psutil.Process(pid)
    for process in (driver, *driver.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            kinds = [kind for kind, words in TITLES.items() if words in title]
            kind = "driver" if process.pid == pid else kinds[0] if kinds else None
            if kind is not None:
                yield f"{kind}: memory (MiB)", process.memory_info().rss / 2**20
                yield f"{kind}: open files", process.num_fds()
                yield f"{kind}: threads", process.num_threads()
    yield "names in /dev/shm", len(os.listdir("/dev/shm"))


def steps_of(path: Path) -> dict[int, float]:
    """Return the seconds of each step in a log of metrics."""
    seconds = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if "timing_s/step" in record["data"]:
            seconds[record["step"]] = record["data"]["timing_s/step"]
    return seconds


def soak(root: Path, steps: int, every_s: float) -> Samples:
    """Train for `steps` steps; return the samples (step, value) of everything that is observed.

    Raises:
        RuntimeError: the run failed.
    """
    run = TinyRun(root)
    process = run.start(
        trainer__total_training_steps=steps,
        trainer__save_freq=1,
        trainer__max_actor_ckpt_to_keep=2,
        trainer__rollout_lag=1,
        actor_rollout_ref__rollout__checkpoint_engine__delta="on",
    )
    log, samples = run.out / "metrics.jsonl", defaultdict(list)
    try:
        while process.poll() is None:
            time.sleep(every_s)
            with contextlib.suppress(psutil.NoSuchProcess):
                if (step := run.last_step()) > 0:
                    for name, value in observe(process.pid):
                        samples[name].append((step, value))
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}: {run.log.read_text()[-3000:]}")
    samples["step (s)"] = list(steps_of(log).items())
    return dict(samples)


def trends(samples: Samples) -> dict[str, Trend]:
    """Return the trend of everything that was observed, without the beginning."""
    last = max(step for step, _ in samples["step (s)"])
    kept = {name: [pair for pair in pairs if pair[0] > WARM_UP * last] for name, pairs in samples.items()}
    return {name: fit(pairs) for name, pairs in sorted(kept.items()) if len(pairs) > 2}


def table(found: dict[str, Trend]) -> str:
    """Return trends as a Markdown table."""
    head = ("observed", "mean", "growth in 1,000 steps", "standard error", "trend")
    rows = [
        [name, f"{trend.mean:.3g}", f"{trend.slope:+.2g}", f"{trend.error:.1g}", "yes" if trend.grows else "no"]
        for name, trend in found.items()
    ]
    return tables.markdown(head, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m campaign.soak", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="steps, each with a weight update")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two samples")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="document to write the table into")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as root:
        found = trends(soak(Path(root), options.steps, options.every))
    text = f"{table(found)}\n\n{options.steps} steps in {(time.monotonic() - started) / 60:.0f} minutes."
    sys.stdout.write(f"{text}\n")
    if options.write is not None:
        caption = tables.caption(f"make soak ARGS=--steps={options.steps}")
        tables.write_section(options.write, "soak", f"{caption}\n\n{text}")
    return int(any(trend.grows for trend in found.values()))


if __name__ == "__main__":
    sys.exit(main())
