"""Print a summary of a run from its metrics.jsonl: reward before and after, mismatch, seconds, output files."""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from verl.report.stage_names import STAGES
from verl.trainer.ppo.checkpoint import CheckpointStore
from verl.utils.tracking import read_steps

Point = tuple[int, float]
Row = tuple[str, str]


def series(records: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Return (step, value) of a metric, for each record that has it as a number."""
    points = []
    for record in records:
        value = record.get("data", {}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            points.append((record["step"], float(value)))
    return points


def change(points: Sequence[Point]) -> str:
    """Format first and last value, such as `0.310 -> 0.962  (step 0 -> 50)`."""
    (first_step, first), (last_step, last) = points[0], points[-1]
    if first_step == last_step:
        return f"{first:.3f}  (step {first_step})"
    return f"{first:.3f} -> {last:.3f}  (step {first_step} -> {last_step})"


def reward_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows on the rewards: on held-out prompts if the run validated, otherwise in training.

    `acc`, the share of right answers, is left out if it equals the reward, because the scorer then returns only a
    number.
    """
    means: dict[tuple[str, str], dict[str, list[Point]]] = {}
    for name in dict.fromkeys(name for record in records for name in record.get("data", {})):
        if not name.startswith(("val-core/", "val-aux/")) or name.count("/") < 3:
            continue
        source, variable, statistic = name.partition("/")[2].rsplit("/", 2)
        points = series(records, name)
        if variable in ("reward", "acc") and statistic.startswith("mean@") and points:
            means.setdefault((source, statistic), {})[variable] = points
    rows = []
    for (source, statistic), points_of in means.items():
        if points_of.get("reward") == points_of.get("acc"):
            del points_of["acc"]
        prompts = f"held-out {source} ({statistic.removeprefix('mean@')} samples each)"
        for variable, label in (("reward", "mean reward"), ("acc", "right answers")):
            if variable in points_of:
                rows.append((f"{label}, {prompts}", change(points_of[variable])))
    if not rows and (points := series(records, "critic/score/mean")):
        rows.append(("mean reward in training (no validation)", change(points)))
    return rows


def mismatch_rows(records: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Rows on the difference between the rollout policy and the trained policy, mainly due to quantization."""
    rows = []
    if points := series(records, "training/rollout_probs_diff_mean"):
        rows.append(("mean |p_rollout - p_trainer| of a token", f"{_median(points):.1e}  (median of the steps)"))
    if points := series(records, "training/rollout_probs_diff_max"):
        step, worst = max(points, key=lambda point: point[1])
        rows.append(("largest of any token", f"{worst:.1e}  (step {step} of {len(points)})"))
    if points := series(records, "rollout_corr/k3_kl"):
        rows.append(("KL of rollout and trainer, k3 estimate", f"{_median(points):.1e}  (median of the steps)"))
    if points := series(records, "weight_update/max_quantization_error"):
        step, error = max(points, key=lambda point: point[1])
        layer = next(r["data"] for r in records if r["step"] == step)["weight_update/max_quantization_error_layer"]
        rows.append(("largest quantization error of a weight", f"{error:.2%}  ({layer})"))
    return rows


def _median(points: Sequence[Point]) -> float:
    return statistics.median(value for _, value in points)


def timing_rows(records: Sequence[Mapping[str, Any]], wall_seconds: float | None) -> list[Row]:
    rows = []
    for stage, label in STAGES.items():
        if points := series(records, f"timing_s/{stage}"):
            rows.append((label, f"{_median(points):.2f} s"))
    steps = series(records, "timing_s/step")
    total = f"{sum(value for _, value in steps):.0f} s for {len(steps)} steps" if steps else ""
    if wall_seconds is not None:
        total = f"{wall_seconds:.0f} s" + (f", of which {total}" if total else "")
    return [*rows, ("total", total)] if total else rows


def file_rows(directory: Path, report: Path | None) -> list[Row]:
    checkpoint = CheckpointStore(directory).latest()
    written = "none" if checkpoint is None else str(directory / checkpoint.name)
    rows = [("log", str(directory / "metrics.jsonl")), ("checkpoint", written)]
    return rows if report is None else [*rows, ("report, for a browser", str(report))]


def render(
    directory: Path,
    wall_seconds: float | None = None,
    next_commands: Sequence[str] = (),
    report: Path | None = None,
) -> str:
    """Render the summary of the run in `directory` as text.

    Args:
        directory: the run's `trainer.default_local_dir`.
        wall_seconds: duration of the run, including its start; None: only the sum of the steps is shown.
        next_commands: commands to show at the end.
        report: the file that `verl report` wrote, if any.

    Raises:
        ValueError: the run has no metrics.
    """
    path = directory / "metrics.jsonl"
    records = [record for record in read_steps(path) if isinstance(record.get("data"), dict)]
    if not records:
        state = "has no metrics" if path.exists() else "does not exist"
        raise ValueError(f"{path} {state}: use the directory of a run whose trainer.logger contains 'file'")
    sections = [
        ("Result", reward_rows(records)),
        ("Rollout against trainer", mismatch_rows(records)),
        ("Seconds (median of the steps)", timing_rows(records, wall_seconds)),
        ("Files", file_rows(directory, report)),
    ]
    width = max(len(label) for _, rows in sections for label, _ in rows)
    lines = []
    for title, rows in sections:
        if rows:
            lines += ["", title, *(f"  {label:<{width}}  {value}" for label, value in rows)]
    if next_commands:
        lines += ["", "Next", *(f"  {command}" for command in next_commands)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("outputs/quickstart"))
    parser.add_argument("--wall-seconds", type=float, help="duration of the run, including its start")
    parser.add_argument(
        "--next", action="append", default=[], metavar="COMMAND", help="a command to show at the end; may be repeated"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="the report of the run")
    given = parser.parse_args(arguments)
    try:
        print(render(given.directory, given.wall_seconds, given.next, given.report))
    except ValueError as error:
        sys.exit(f"summary.py: {error}")


if __name__ == "__main__":
    main()
