"""Measure what `actor.old_log_probs_from_rollout` saves: a GRPO step with it against the same step without it.

    python benchmarks/old_log_probs.py [--sizes 0.8M 135M] [--lengths equal ragged] [--rounds 5] [--write DOCUMENT]

Both runs are `python3 -m verl.trainer.main_ppo` on the loads of `grpo_step.py`, in float32 and without quantization,
and take turns step by step, so that other work on the machine affects both alike.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import machine
import models
import runs
import tables
from grpo_step import WARM_UP, add_load_options, chosen_loads
from pace import PacedProcess

_ENABLE = "actor_rollout_ref.actor.old_log_probs_from_rollout.enable"
_STAGE, _REUSED = "timing_s/old_log_prob", "rollout_corr/reused_fraction"


def measure(load: runs.Load, model_dir: Path, work: Path, rounds: int) -> dict[bool, tuple[list[float], list]]:
    """Return seconds and metrics of each measured step, without and with the option.

    Raises:
        RuntimeError: the check of a step failed, so that nothing was saved.
    """
    configs = {
        reuse: runs.keys(load, model_dir, work / str(reuse), steps=1000, overrides={_ENABLE: reuse})
        for reuse in (False, True)
    }
    sides = {
        reuse: PacedProcess(runs.command(config), runs.environment(), runs.HERE.parent, work / f"{reuse}.log")
        for reuse, config in configs.items()
    }
    seconds: dict[bool, list[float]] = {reuse: [] for reuse in sides}
    try:
        for side in sides.values():
            side.wait_for_arrival()
        for number in range(WARM_UP + rounds):
            for reuse, side in sides.items():
                elapsed, _ = side.step()
                if number >= WARM_UP:
                    seconds[reuse].append(elapsed)
        recorded = {reuse: runs.metrics(config)[WARM_UP : WARM_UP + rounds] for reuse, config in configs.items()}
    finally:
        for side in sides.values():
            side.close()
    if not all(step[_REUSED] > 0 for step in recorded[True]):
        raise RuntimeError(f"a check failed: {_REUSED} is {[step[_REUSED] for step in recorded[True]]}")
    return {reuse: (seconds[reuse], recorded[reuse]) for reuse in sides}


def row(size: str, lengths: str, load: runs.Load, measured: dict[bool, tuple[list[float], list]]) -> list[str]:
    """Row of the table."""
    (without, plain), (with_it, reusing) = measured[False], measured[True]
    ratios = [one / other for one, other in zip(with_it, without, strict=True)]
    return [
        size,
        lengths,
        f"{load.samples} samples, {load.tokens} tokens",
        f"{statistics.median(without):.2f}",
        f"{statistics.median(with_it):.2f}",
        f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{runs.median(plain, _STAGE):.2f}, {runs.median(reusing, _STAGE):.2f}",
        f"{runs.median(reusing, _REUSED):.0%}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_load_options(parser)
    parser.add_argument("--rounds", type=int, default=5, help=f"measured steps, after {WARM_UP} warm-up steps")
    tables.add_write_option(parser)
    options = parser.parse_args()
    print(machine.header(), flush=True)
    rows = []
    for size, lengths, load in chosen_loads(options):
        with tempfile.TemporaryDirectory() as work:
            model_dir = models.write_model(size, Path(work) / "model")
            rows.append(row(size, lengths, load, measure(load, model_dir, Path(work), options.rounds)))
        print(*rows[-1], sep="  ", flush=True)
    head = ["model", "lengths", "work per step", "without, s", "with, s", "with / without"]
    head += ["the pass, s: without, with", "reused tokens"]
    command = (
        f"python benchmarks/old_log_probs.py --sizes {' '.join(options.sizes)} --lengths {' '.join(options.lengths)}"
    )
    text = f"{tables.caption(command)} Median of {options.rounds} rounds.\n\n{tables.markdown(head, rows)}"
    print(f"\n{text}")
    if options.write:
        tables.write_section(options.write, "old_log_probs", text)


if __name__ == "__main__":
    main()
