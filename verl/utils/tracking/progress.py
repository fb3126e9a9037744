"""Progress display: a rich bar on a terminal, one plain line per step elsewhere."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from verl.utils.console import write_line

REWARD_NAMES = ("critic/score/mean", "critic/rewards/mean")
WINDOW = 10


def duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h07m`, `3d04h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


class TimeLeft:
    """Estimates the seconds left from the pace of the last `WINDOW` steps, including validations and saves.

    The first step counts only until there is a second one, because it contains work that a run does once.
    """

    def __init__(self, total_steps: int, start_step: int = 0, clock: Callable[[], float] = time.monotonic):
        self._total, self._start, self._clock = total_steps, start_step, clock
        self._marks: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=WINDOW + 1)

    def update(self, step: int) -> float | None:
        """Record that `step` is done. Return the seconds left, or None before the first step."""
        if step > self._marks[-1][0]:
            self._marks.append((step, self._clock()))
            if len(self._marks) == 3 and self._marks[0][0] == self._start:
                self._marks.popleft()
        elif len(self._marks) == 1:
            # Logged before the first step: the initial validation is not part of a step.
            self._marks[0] = step, self._clock()
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step == first_step:
            return None
        return (last_time - first_time) / (last_step - first_step) * max(self._total - last_step, 0)


def reward_of(metrics: Mapping[str, Any]) -> float | None:
    """Return the mean score of the step, if the metrics have one."""
    return next((float(metrics[name]) for name in REWARD_NAMES if metrics.get(name) is not None), None)


def tokens_per_second(metrics: Mapping[str, Any]) -> float | None:
    """Return the tokens per second of the full run (not per device), if the metrics have them."""
    tokens, seconds = metrics.get("perf/total_num_tokens"), metrics.get("perf/time_per_step")
    return None if tokens is None or not seconds else float(tokens) / float(seconds)


class Progress:
    """Shows step, reward, tokens/s and time left; a context manager.

    On a terminal it is one bar at the bottom; other output to sys.stdout and sys.stderr scrolls above it. Elsewhere
    `update` writes one line, unless `lines` is False (the console backend writes its own line).

    Args:
        total_steps: last step of the run.
        start_step: steps already done (a resumed run).
        lines: write plain lines if there is no terminal.
        stream: output; sys.stdout by default.
    """

    def __init__(self, total_steps: int, start_step: int = 0, lines: bool = True, stream: TextIO | None = None):
        self._total, self._lines, self._stream = total_steps, lines, stream
        self._left = TimeLeft(total_steps, start_step)
        self._bar: RichProgress | None = None
        console = Console(file=stream)
        if console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, status="")

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show that `step` is done, with its metrics (upstream verl's names)."""
        status = self._status(step, metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif self._lines:
            write_line(f"step {step}/{self._total}  {status}".rstrip(), self._stream)

    def close(self) -> None:
        """Restore the terminal; may be called twice."""
        if self._bar is not None:
            self._bar.stop()

    def _status(self, step: int, metrics: Mapping[str, Any]) -> str:
        left = self._left.update(step)
        reward, speed = reward_of(metrics), tokens_per_second(metrics)
        parts = [
            None if reward is None else f"reward {reward:.3f}",
            None if speed is None else f"{speed:.0f} tokens/s",
            None if left is None else f"{duration(left)} left",
        ]
        return "  ".join(part for part in parts if part is not None)
