"""Measure how update time, step time and memory grow with model size, samples per step, ranks and replicas.

    python benchmarks/growth.py [--parts size samples processes] [--steps 5] [--write DOCUMENT]

Every table row is a run of `python3 -m verl.trainer.main_ppo` with random weights: medians over its steps after two
warm-up steps. The exponent is the slope of a least-squares line through the logarithms; the exponents between neighbors
stand beside it. 1 means proportional; less than 1 means that a fixed cost has a share. Memory is the high-water mark
(VmHWM) of each process of the run, read until the process ends; shared pages (libraries, buckets of the weight update)
count in every process that maps them. The last column is the estimate of preflight for a rank, and for a replica with
its engine.

- size: full weight updates (delta=off), unquantized and in MXFP8, one rank to one replica, 1M to 500M parameters.
- samples: a step of the 0.8M model, 6 tokens per sample, four optimizer steps, micro-batches of 256 samples.
- processes: a step and an update of a 21M model over trainer ranks and replicas. On a machine with two cores all of
  them share the cores, so the table shows the cost of a second process, not its benefit.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fit
import machine
import models
import runs
import tables
from peaks import PeakWatcher

from verl.config import load_config
from verl.preflight import check
from verl.preflight.estimate import MemoryEstimate

WARM_UP = 2
QUANTIZATION = "actor_rollout_ref.rollout.quantization"
FULL_UPDATES = {"actor_rollout_ref.rollout.checkpoint_engine.delta": "off"}
SIZES = tuple(models.GROWTH)
SAMPLES = (64, 256, 1024, 4096)
# (trainer ranks, replicas)
PROCESSES = ((1, 1), (2, 1), (1, 2), (2, 2))
TINY = runs.Load(prompts=2, n=2, shortest=4, longest=4, updates=1, micro_batch=4)
SHARED = runs.Load(prompts=8, n=8, shortest=16, longest=16, updates=2, micro_batch=32)


@dataclass
class Measured:
    """Results of a run.

    Attributes:
        steps: metrics of each step after the warm-up.
        peaks: memory high-water marks of its processes in MiB, by role.
        estimate: the estimate of preflight.
    """

    steps: list[dict[str, float]]
    peaks: dict[str, list[int]]
    estimate: MemoryEstimate

    def median(self, name: str) -> float:
        return runs.median(self.steps, name)

    def memory(self) -> list[str]:
        """Table cells in MiB: one for each of `MEMORY_ROLES`, its processes joined by "+", and one for the estimate."""
        measured = ["+".join(map(str, self.peaks.get(role, []))) for role in MEMORY_ROLES]
        estimated = (self.estimate.trainer_bytes, self.estimate.replica_bytes)
        return [*measured, ", ".join(f"{part >> 20}" for part in estimated)]


MEMORY_ROLES = ("driver", "trainer rank", "replica", "engine process")
MEMORY_HEAD = [
    "driver, MiB",
    "trainer ranks, MiB",
    "replicas, MiB",
    "their engines, MiB",
    "estimated: a rank, a replica and its engine",
]


def measure(size: str, load: runs.Load, steps: int, overrides: Mapping[str, Any]) -> Measured:
    """Run a load and record metrics and memory."""
    with tempfile.TemporaryDirectory() as work:
        model_dir = models.write_model(size, Path(work) / "model")
        config = runs.keys(load, model_dir, Path(work) / "run", WARM_UP + steps, overrides)
        estimate = check(load_config(runs.overrides_of(config))).memory
        assert estimate is not None
        process = runs.start(config)
        watcher = PeakWatcher(process.pid)
        try:
            recorded = runs.finish(process, config)
        finally:
            peaks = watcher.stop()
    return Measured(recorded[WARM_UP:], peaks, estimate)


def exponents(name: str, x: Sequence[float], y: Sequence[float]) -> str:
    """Sentence on the growth of `y` with `x`; empty for fewer than two points."""
    if len(x) < 2:
        return ""
    exponent, _ = fit.power_law(x, y)
    local = ", ".join(f"{value:.2f}" for value in fit.local_exponents(x, y))
    return f"{name}: exponent **{exponent:.2f}** (between neighbors {local})."


def by_size(options: argparse.Namespace) -> str:
    """Section on update time over model size."""
    rows, parameters = [], []
    seconds: dict[str, list[float]] = {"null": [], "ascend": []}
    for size in options.sizes:
        results = {name: measure(size, TINY, options.steps, {**FULL_UPDATES, QUANTIZATION: name}) for name in seconds}
        for name, result in results.items():
            seconds[name].append(result.median("weight_update/total_s"))
        parameters.append(models.parameters(size))
        cells = [f"{parameters[-1] / 1e6:.1f}M"]
        for result in results.values():
            cells += [f"{result.median('weight_update/MiB'):.1f}", f"{result.median('weight_update/total_s'):.3f}"]
        rows.append([*cells, *results["ascend"].memory()])
        print(*rows[-1], sep="  ", flush=True)
    head = ["parameters", "float32, MiB", "s", "MXFP8, MiB", "s", *MEMORY_HEAD]
    sentences = [exponents(name, parameters, y) for name, y in zip(("float32", "MXFP8"), seconds.values(), strict=True)]
    return _section("Full weight update over model size; memory of the MXFP8 runs.", head, rows, sentences)


def by_samples(options: argparse.Namespace) -> str:
    """Section on step time over samples per step."""
    rows, seconds = [], []
    for samples in options.samples:
        load = runs.Load(prompts=samples // 16, n=16, shortest=6, longest=6, updates=4, micro_batch=256)
        result = measure("0.8M", load, options.steps, {})
        seconds.append(result.median("timing_s/step"))
        stages = [f"{result.median(f'timing_s/{name}'):.3f}" for name in ("gen", "old_log_prob", "update_actor")]
        rows.append([str(samples), f"{seconds[-1]:.3f}", *stages, *result.memory()])
        print(*rows[-1], sep="  ", flush=True)
    head = ["samples", "step, s", "generation", "old log-probabilities", "updates", *MEMORY_HEAD]
    sentences = [exponents("step", options.samples, seconds)]
    return _section("Step over samples, 0.8M parameters, 6 tokens each.", head, rows, sentences)


def by_processes(options: argparse.Namespace) -> str:
    """Section on step and update time over ranks and replicas."""
    rows = []
    steps: dict[tuple[int, int], float] = {}
    for ranks, replicas in PROCESSES:
        standalone = {"actor_rollout_ref.rollout.nnodes": 1, "actor_rollout_ref.rollout.n_gpus_per_node": replicas}
        keys = {"trainer.n_gpus_per_node": ranks, **FULL_UPDATES, **standalone}
        result = measure(options.size, SHARED, options.steps, keys)
        steps[ranks, replicas] = result.median("timing_s/step")
        names = ("timing_s/step", "timing_s/gen", "timing_s/update_actor", "weight_update/total_s")
        figures = [f"{result.median(name):.3f}" for name in names]
        rows.append([str(ranks), str(replicas), *figures, *result.memory()])
        print(*rows[-1], sep="  ", flush=True)
    head = ["ranks", "replicas", "step, s", "generation", "updates", "weight update", *MEMORY_HEAD]
    one = steps[1, 1]
    sentences = [
        exponents("step over ranks", (1, 2), (one, steps[2, 1])),
        exponents("step over replicas", (1, 2), (one, steps[1, 2])),
        exponents("step over both", (1, 2), (one, steps[2, 2])),
    ]
    load = f"{SHARED.samples} samples x {SHARED.longest} tokens"
    title = f"Step over ranks and replicas, {options.size} parameters, {load}."
    return _section(title, head, rows, sentences)


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], sentences: Sequence[str]) -> str:
    return "\n\n".join(filter(None, [title, tables.markdown(head, rows), " ".join(filter(None, sentences))]))


PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "size": by_size,
    "samples": by_samples,
    "processes": by_processes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES, help="model sizes of the part `size`")
    parser.add_argument(
        "--samples",
        nargs="+",
        type=int,
        default=SAMPLES,
        help="of the part `samples`; multiples of 64",
    )
    parser.add_argument("--size", default="21M", choices=SIZES, help="model size of the part `processes`")
    parser.add_argument("--steps", type=int, default=5, help=f"measured steps, after {WARM_UP} warm-up steps")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    sections = [PARTS[part](options) for part in options.parts]
    text = "\n\n".join([f"{tables.caption('make bench-growth')} Medians of {options.steps} steps.", *sections])
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "growth", text)


if __name__ == "__main__":
    main()
