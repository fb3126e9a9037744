"""Compare a GRPO step of verl with one of TRL's `GRPOTrainer`: same model, prompts, lengths, samples, optimizer steps.

    python benchmarks/grpo_step.py [--sizes 0.8M 135M] [--lengths equal ragged] [--rounds 5] [--write DOCUMENT]

Both sides run at the same time, in separate processes, and alternate: each waits at a gate before every step, and a
step of verl is followed by a step of TRL. Each ratio thus compares two consecutive steps on the same machine. A step
lasts from one gate to the next: generation, rewards, old log-probabilities, optimizer steps and, on verl's side, the
weight update and logging.

These are the same on both sides: weights in float32, sampling at temperature 1, no KL term, learning rate 1e-6 with
AdamW and clipping, no gradient checkpointing, samples per micro-batch, and two optimizer steps per generation (so that
both sides compute old log-probabilities; with one, TRL would skip them). The tokens of every response are also the
same: a prompt encodes the length of its response (`task.py`), and the benchmark fails if the token counts differ.

These differ: verl's side is `python3 -m verl.trainer.main_ppo` with a vLLM engine and a metrics file, and its processes
keep freed memory. TRL generates with transformers' `generate`, its default, logs nothing, and keeps freed memory only
with --trl-keeps-memory. Its alternatives are not usable on a CPU: vLLM in the same process fails at the first step,
because `load_weights` does not work on an engine whose CPU kernels have packed their weights; and
`use_transformers_continuous_batching` is more than ten times slower (docs/performance.md).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import machine
import models
import runs
import tables
from pace import PacedProcess
from runs import Load

from verl.utils.host import cpu_cores, cpu_environment, thread_environment

LOADS = {
    ("0.8M", "equal"): Load(prompts=32, n=16, shortest=6, longest=6, updates=2, micro_batch=256),
    ("0.8M", "ragged"): Load(prompts=16, n=8, shortest=32, longest=256, updates=2, micro_batch=32),
    ("135M", "equal"): Load(prompts=8, n=4, shortest=32, longest=32, updates=2, micro_batch=16),
    ("135M", "ragged"): Load(prompts=8, n=4, shortest=32, longest=256, updates=2, micro_batch=8),
}
TARGETS = {"equal": 1.0, "ragged": 1.3}
WARM_UP = 2
STAGES = ("old_log_prob", "adv", "update_actor", "update_weights")


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `chosen_loads` reads."""
    parser.add_argument("--sizes", nargs="+", default=["0.8M", "135M"], choices=["0.8M", "135M"])
    parser.add_argument("--lengths", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--prompts", type=int, help="prompts per step; default: those of the load")


def chosen_loads(options: argparse.Namespace) -> Iterator[tuple[str, str, Load]]:
    """Yield size, lengths and load of each chosen pair, in the order of `LOADS`."""
    for (size, lengths), load in LOADS.items():
        if size in options.sizes and lengths in options.lengths:
            yield size, lengths, load.scaled(options.prompts)


@dataclass
class Outcome:
    """Seconds per step, by round, of both sides; and median seconds of the stages on our side (`timing_s`)."""

    ours: list[float]
    trl: list[float]
    stages: dict[str, float]

    def ratio(self) -> float:
        """Median over the rounds of TRL's seconds divided by ours; above 1, ours is faster."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.ours, self.trl, strict=True))


def trl_process(load: Load, model_dir: Path, work: Path, keeps_memory: bool) -> PacedProcess:
    """Start TRL's side in its own environment."""
    specification = work / "load.json"
    specification.write_text(load.to_json())
    command = [".cache/trl/bin/python", runs.HERE / "trl_side.py", specification, model_dir, work / "trl"]
    environment = cpu_environment if keeps_memory else thread_environment
    variables = {**environment(cpu_cores()), "HF_HUB_OFFLINE": "1"}
    return PacedProcess(list(map(str, command)), variables, runs.HERE.parent, work / "trl.log")


def measure(load: Load, model_dir: Path, work: Path, options: argparse.Namespace) -> Outcome:
    """Run the steps of both sides alternately.

    Raises:
        RuntimeError: a side generated another number of tokens than the load requests.
    """
    config = runs.keys(load, model_dir, work / "ours", steps=1000)
    sides = {"ours": PacedProcess(runs.command(config), runs.environment(), runs.HERE.parent, work / "ours.log")}
    if not options.without_trl:
        sides["trl"] = trl_process(load, model_dir, work, options.trl_keeps_memory)
    seconds: dict[str, list[float]] = {"ours": [], "trl": []}
    try:
        for side in sides.values():
            side.wait_for_arrival()
        for number in range(WARM_UP + options.rounds):
            for name, side in sides.items():
                elapsed, tokens = side.step()
                if tokens != load.tokens:
                    raise RuntimeError(f"{name} generated {tokens} tokens in a step, expected {load.tokens}")
                if number >= WARM_UP:
                    seconds[name].append(elapsed)
        recorded = runs.metrics(config)[WARM_UP : WARM_UP + options.rounds]
    finally:
        for side in sides.values():
            side.close()
    return Outcome(**seconds, stages={stage: runs.median(recorded, f"timing_s/{stage}") for stage in STAGES})


def row(size: str, lengths: str, load: Load, outcome: Outcome) -> list[str]:
    """Row of the table."""
    ours = statistics.median(outcome.ours)
    spread = f"{load.shortest} to {load.longest}" if load.shortest < load.longest else str(load.longest)
    rest = ours - sum(outcome.stages.values())
    stages = ", ".join(f"{name} {value:.2f}" for name, value in {"generation and rest": rest, **outcome.stages}.items())
    if not outcome.trl:
        return [size, lengths, f"{load.samples} x {spread}", f"{ours:.2f}", "-", "-", "-", stages]
    ratios = [theirs / mine for mine, theirs in zip(outcome.ours, outcome.trl, strict=True)]
    return [
        size,
        lengths,
        f"{load.samples} x {spread}",
        f"{ours:.2f}",
        f"{statistics.median(outcome.trl):.2f}",
        f"**{outcome.ratio():.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{TARGETS[lengths]:.1f}",
        stages,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_load_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help=f"measured steps, after {WARM_UP} warm-up steps")
    parser.add_argument("--without-trl", action="store_true", help="run only our side")
    parser.add_argument("--trl-keeps-memory", action="store_true", help="TRL keeps freed memory, as ours does")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    if not options.without_trl:
        subprocess.run([runs.HERE.parent / "scripts/setup_trl.sh"], check=True)
    rows = []
    for size, lengths, load in chosen_loads(options):
        with tempfile.TemporaryDirectory() as work:
            outcome = measure(load, models.write_model(size, Path(work) / "model"), Path(work), options)
        rows.append(row(size, lengths, load, outcome))
        print(*rows[-1], sep="  ", flush=True)
    head = ["model", "lengths", "samples x tokens", "ours, s", "TRL, s", "TRL / ours", "target", "ours by stage, s"]
    text = f"{tables.caption('make bench-step')} Median of {options.rounds} rounds.\n\n{tables.markdown(head, rows)}"
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "grpo_step", text)


if __name__ == "__main__":
    main()
