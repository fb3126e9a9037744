"""The `console` backend: one readable line per step with the main metrics."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from verl.utils.console import write_line
from verl.utils.tracking.progress import TimeLeft, duration, tokens_per_second

logger = logging.getLogger(__name__)

# Format by metric name, in the order of the line.
KEY_METRICS = {
    "critic/score/mean": "score {:.3f}",
    "critic/rewards/mean": "reward {:.3f}",
    "response_length/mean": "length {:.1f}",
    "response_length/clip_ratio": "clipped {:.0%}",
    "actor/pg_loss": "pg_loss {:.4g}",
    "critic/vf_loss": "vf_loss {:.4g}",
    "actor/entropy": "entropy {:.3f}",
    "actor/kl_loss": "kl_loss {:.2e}",
    "actor/grad_norm": "grad_norm {:.3g}",
    "actor/lr": "lr {:.1e}",
    "training/rollout_probs_diff_max": "probs_diff {:.1e}",
    "timing_s/gen": "gen {:.1f}s",
    "timing_s/update_actor": "update {:.1f}s",
    "timing_s/update_weights": "sync {:.1f}s",
    "timing_s/step": "step {:.1f}s",
}
SHOWN_CHARACTERS = 120


def format_line(data: Mapping[str, Any], step: int, total_steps: int | None = None, left: float | None = None) -> str:
    """`step 3/20  score 0.412  ...  val spell/acc/mean@4 0.61  512 tokens/s  2m10s left`.

    A metric that the step lacks is omitted, and so is a reward equal to the score.
    """
    parts = [f"step {step}" if total_steps is None else f"step {step}/{total_steps}"]
    for name, shown in KEY_METRICS.items():
        value = data.get(name)
        if _is_number(value) and not (name == "critic/rewards/mean" and value == data.get("critic/score/mean")):
            parts.append(shown.format(value))
    for name in sorted(data):
        if name.startswith("val-core/") and _is_number(data[name]):
            parts.append(f"val {name.removeprefix('val-core/')} {data[name]:.3f}")
    if (speed := tokens_per_second(data)) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shortened(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."


class ConsoleBackend:
    """Writes `format_line` for every step, and all metrics to the debug log as `step:N - name:value - ...`.

    Args:
        total_steps: last step of the run, for "3/20" and the time left; None omits both.
        start_step: steps already done.
        stream: output; by default the current sys.stdout at each call, so that a progress bar stays intact.
    """

    def __init__(self, total_steps: int | None = None, start_step: int = 0, stream: TextIO | None = None):
        self._total, self._stream = total_steps, stream
        self._left = None if total_steps is None else TimeLeft(total_steps, start_step)

    def log(self, data: Mapping[str, Any], step: int) -> None:
        left = None if self._left is None else self._left.update(step)
        self._write(format_line(data, step, self._total, left))
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(" - ".join([f"step:{step}", *(f"{name}:{value}" for name, value in data.items())]))

    def log_generations(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for row in rows:
            score = row.get("score")
            shown = f"{score:.3f}" if _is_number(score) else str(score)
            self._write(
                f"step {step}  sample  score {shown}  {_shortened(row.get('input'))} -> {_shortened(row.get('output'))}"
            )

    def finish(self) -> None:
        return None

    def _write(self, line: str) -> None:
        write_line(line, self._stream)
