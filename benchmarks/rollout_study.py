"""Does a quantized rollout train as well as an unquantized one? GRPO on two tasks in five ways, several seeds each.

    python benchmarks/rollout_study.py [--steps 50] [--seeds 1 2 3] [--tasks dense experts] [--work DIRECTORY]
                                       [--write docs/quantized_rollout.md]

The tasks: words of five letters spelled backwards by the dense model of the quickstart, and words of six letters by a
model with experts. The rollouts: float32; MXFP8 without correction; MXFP8 with truncated importance weights per token
(preset decoupled_token_is); MXFP8 with quantization-aware training, without and with these weights. Nothing else
differs within a seed. Prints a table for each task. With `--write` the tables go into the document, and two charts for
each task beside it: the reward in training, and the KL between rollout and trainer. Lines are means over the seeds;
bands range from the lowest to the highest seed. The seconds of a step are the median of further, short runs at the end,
one for each way, so that they need a quiet machine only then. Takes about 80 minutes on two cores. With `--work`, the
runs stay there, and the same command goes on after the last finished one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from quickstart_runs import ROOT, run_once, series, validation
from tables import add_write_option, write_section

QUANTIZATION = "actor_rollout_ref.rollout.quantization"
_QAT = "actor_rollout_ref.actor.fsdp_config.qat.enable"
_PRESET = "algorithm.rollout_correction.preset"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {QUANTIZATION: "null"},
    "MXFP8": {QUANTIZATION: "ascend", _QAT: False},
    "MXFP8, token TIS": {QUANTIZATION: "ascend", _QAT: False, _PRESET: "decoupled_token_is"},
    "MXFP8, QAT": {QUANTIZATION: "ascend", _QAT: True},
    "MXFP8, QAT, token TIS": {QUANTIZATION: "ascend", _QAT: True, _PRESET: "decoupled_token_is"},
}
# Arguments of examples/quickstart/prepare.py.
TASKS: dict[str, list[str]] = {
    "dense": [],
    "experts": ["--experts", "8", "--min-word-len", "6", "--max-word-len", "6"],
}
REWARD, MISMATCH = "critic/score/mean", "rollout_corr/k3_kl"
Steps = dict[int, dict[str, Any]]
Runs = dict[str, list[Steps]]
TIMED_STEPS = 10


def prepare(directory: Path, arguments: list[str]) -> dict[str, Any]:
    """Write the model and the data of a task; return the keys that select them."""
    if not (directory / "test.parquet").exists():
        command = [sys.executable, ROOT / "examples/quickstart/prepare.py", "--output", directory, *arguments]
        subprocess.run(command, cwd=ROOT, check=True)
    return {
        "actor_rollout_ref.model.path": directory / "model",
        "data.train_files": directory / "train.parquet",
        "data.val_files": directory / "test.parquet",
    }


def table(task: str, runs: Runs, seconds: dict[str, float], options: argparse.Namespace) -> str:
    """Markdown table of the final rewards of each variant, per seed, below a line that describes the machine."""
    described = machine.describe()
    lines = [
        f'`make study ARGS="--tasks {task}"`, {options.steps} steps, '
        f"seeds {', '.join(map(str, options.seeds))}; {described['date']}, "
        f"{described['kind']}, {described['cores']}.",
        "",
        f"| {task}: rollout | held-out reward before | after, by seed | mean | KL (k3) in the first step | mean "
        "| last step | seconds per step |",
        "|-|-|-|-|-|-|-|-|",
    ]
    for name, seeds in runs.items():
        before = [validation(steps)[0][1] for steps in seeds]
        after = [validation(steps)[-1][1] for steps in seeds]
        kl = [[value for _, value in series(steps, MISMATCH)] for steps in seeds]
        first, mean, last = (
            statistics.mean(f(values) for values in kl) for f in (lambda v: v[0], statistics.mean, lambda v: v[-1])
        )
        lines.append(
            f"| {name} | {statistics.mean(before):.3f} | {', '.join(f'{value:.3f}' for value in after)} "
            f"| {statistics.mean(after):.3f} | {first:.1e} | {mean:.1e} | {last:.1e} | {seconds[name]:.2f} |"
        )
    return "\n".join(lines)


def draw(task: str, runs: Runs, path: Path) -> None:
    """Draw reward and mismatch over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, metric, title in (
        (axes[0], REWARD, f"{task}: reward in training, mean of the step"),
        (axes[1], MISMATCH, f"{task}: KL of rollout and trainer (k3), nats per token"),
    ):
        for name, seeds in runs.items():
            curves = [dict(series(steps, metric)) for steps in seeds]
            steps = sorted(set.intersection(*(set(curve) for curve in curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            (line,) = axis.plot(steps, [statistics.mean(column) for column in values], label=name)
            lowest, highest = [min(column) for column in values], [max(column) for column in values]
            axis.fill_between(steps, lowest, highest, alpha=0.2, color=line.get_color())
        axis.set_title(title)
        axis.set_xlabel("training step")
    axes[1].set_yscale("log")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def compare(task: str, work: Path, options: argparse.Namespace) -> Runs:
    """Train on a task in all ways with all seeds."""
    selected = prepare(work / task, TASKS[task])
    runs: Runs = {name: [] for name in VARIANTS}
    for seed in options.seeds:
        for number, (name, keys) in enumerate(VARIANTS.items()):
            length = {"trainer.total_training_steps": options.steps, "trainer.test_freq": options.steps}
            steps = run_once(work / f"{task}.{number}.{seed}", {"trainer.seed": seed, **length, **selected, **keys})
            runs[name].append(steps)
            before, *_, after = (value for _, value in validation(steps))
            mismatch = statistics.mean(value for _, value in series(steps, MISMATCH))
            print(f"{task:<8} {name:<22} seed {seed}: {before:.3f} -> {after:.3f}, k3 {mismatch:.1e}", flush=True)
    return runs


def time_steps(task: str, work: Path) -> dict[str, float]:
    """Return the median seconds of a step of a task, by way."""
    selected = prepare(work / task, TASKS[task])
    length = {"trainer.total_training_steps": TIMED_STEPS, "trainer.test_freq": -1, "trainer.val_before_train": False}
    seconds = {}
    for number, (name, keys) in enumerate(VARIANTS.items()):
        steps = run_once(work / f"{task}.{number}.timed", {**length, **selected, **keys})
        seconds[name] = statistics.median(value for _, value in series(steps, "timing_s/step")[1:])
        print(f"{task:<8} {name:<22} {seconds[name]:.2f} s per step", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--work", type=Path, help="directory for the runs, which are kept; otherwise a temporary one")
    add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    with contextlib.ExitStack() as stack:
        work = (options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        tasks = {task: compare(task, work, options) for task in options.tasks}
        seconds = {task: time_steps(task, work) for task in tasks}
    for task, runs in tasks.items():
        text = table(task, runs, seconds[task], options)
        print(f"\n{text}")
        if options.write:
            write_section(options.write, f"study {task}", text)
            draw(task, runs, options.write.with_name(f"{options.write.stem}_{task}.png"))


if __name__ == "__main__":
    main()
