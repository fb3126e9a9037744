"""Numbers at the top of the report: progress and results of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from verl.report.run import Curve, Run, is_number
from verl.report.style import number, percent, short
from verl.report.text import visible
from verl.utils.tracking.progress import duration

# An end of a noisy curve is the mean of at most this number of steps, or of half of a short curve.
_ENDS = 5
# A run that was silent for longer than this number of steps, and for a minute, counts as ended.
_SILENT_STEPS, _SILENT_SECONDS = 10, 60.0


@dataclass(frozen=True)
class Fact:
    """A number per run: its name, its value by run ("-" if missing), and how it is computed."""

    label: str
    values: list[str]
    how: str


def state(run: Run) -> str:
    """Return the progress: `finished, 50 steps`, `at step 12 of 50, ...`."""
    if not run.records:
        return "no step is recorded"
    last, total = max(run.records), run.config.get("trainer.total_training_steps")
    if is_number(total) and last >= total:
        return f"finished, {last:,} steps"
    assert run.silent_seconds is not None
    pace = [seconds for seconds in run.curve("timing_s/step")[1] if math.isfinite(seconds)]
    patience = max(_SILENT_SECONDS, _SILENT_STEPS * max(pace[-10:], default=0.0))
    of = f" of {total:,}" if is_number(total) else ""
    going = "running or just stopped" if run.silent_seconds < patience else "ended, or stopped"
    return f"at step {last:,}{of}; {going}: last record {duration(run.silent_seconds)} before this report"


def about(run: Run) -> str:
    """Return model, algorithm and quantization, if the config is known."""
    config = run.config
    model = config.get("actor_rollout_ref.model.path")
    quantization = config.get("actor_rollout_ref.rollout.quantization")
    parts = [
        f"{config.get('trainer.project_name')} / {config.get('trainer.experiment_name')}",
        f"model {'/'.join(PurePath(str(model)).parts[-2:])}" if model else None,
        f"advantages {config.get('algorithm.adv_estimator')}",
        f"rollout quantized: {quantization}" if quantization else "rollout not quantized",
    ]
    return visible(" · ".join(part for part in parts if part), 400) if config else "its config is not recorded"


def facts(runs: Sequence[Run]) -> list[Fact]:
    """Return the facts that at least one run has."""
    core = list(dict.fromkeys(name for run in runs for name in run.names() if name.startswith("val-core/")))
    means = [name for name in core if "/mean@" in name][:2]
    found = [
        _fact("Reward in training", runs, "critic/score/mean", _ends, f"mean of up to {_ENDS} steps at either end"),
        *(_fact(_variable(name), runs, name, _first_last, "first and last validation") for name in means),
        _fact("Length of a response", runs, "response_length/mean", _ends, "tokens, first and last steps"),
        _fact("Entropy", runs, "actor/entropy", _ends, "nats per token, first and last steps"),
        _fact("Rollout against trainer", runs, "training/rollout_probs_diff_mean", _median,
              "mean difference of a token's probability, median of the steps"),
        _fact("Quantization error", runs, "weight_update/max_quantization_error", _largest, "of the worst weight"),
        _fact("Time of a step", runs, "timing_s/step", _seconds, "median of the steps"),
        _fact("Throughput", runs, "perf/throughput", _speed, "per device, median of the steps"),
        _fact("Memory of the trainer", runs, "actor/perf/max_memory_allocated_gb", _memory, "peak of a rank"),
    ]  # fmt: skip
    return [fact for fact in found if any(value != "-" for value in fact.values)]


def _fact(label: str, runs: Sequence[Run], metric: str, say: Callable[[list[float]], str], how: str) -> Fact:
    values = [_finite(run.curve(metric)) for run in runs]
    return Fact(label, [say(of_run) if of_run else "-" for of_run in values], how)


def _variable(name: str) -> str:
    source, _, variable = name.partition("/")[2].rpartition("/")[0].rpartition("/")
    return f"Validation: {short(variable, 40)}, {short(source.rpartition('/')[2], 40)}"


def _finite(curve: Curve) -> list[float]:
    return [value for value in curve[1] if math.isfinite(value)]


def _ends(values: list[float]) -> str:
    if len(values) == 1:
        return _first_last(values)
    steps = min(_ENDS, len(values) // 2)
    return _first_last([statistics.fmean(values[:steps]), statistics.fmean(values[-steps:])])


def _first_last(values: list[float]) -> str:
    first, last = number(float(f"{values[0]:.3g}")), number(float(f"{values[-1]:.3g}"))
    return f"{first} → {last}" if len(values) > 1 else first


def _median(values: list[float]) -> str:
    return number(float(f"{statistics.median(values):.2g}"))


def _largest(values: list[float]) -> str:
    return percent(float(f"{max(values):.3g}"))


def _seconds(values: list[float]) -> str:
    return f"{number(float(f'{statistics.median(values):.3g}'))} s"


def _speed(values: list[float]) -> str:
    return f"{number(round(statistics.median(values)))} tokens/s"


def _memory(values: list[float]) -> str:
    return f"{number(float(f'{max(values):.3g}'))} GiB"
