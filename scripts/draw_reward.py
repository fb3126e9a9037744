"""Draw the reward curve of a run as an SVG file: `python scripts/draw_reward.py RUN_DIR OUTPUT`.

RUN_DIR contains `metrics.jsonl`. The figure in the README shows the run in `outputs/quickstart`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TRAIN, HELD_OUT = "critic/score/mean", "val-core/reasoning_gym/spell_backward/acc/mean@4"
REWARD = "val-aux/reasoning_gym/spell_backward/reward/mean@4"


def series(rows: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of a metric."""
    found = [(row["step"], row["data"][name]) for row in rows if name in row["data"]]
    return [step for step, _ in found], [value for _, value in found]


def main() -> None:
    run, output = map(Path, sys.argv[1:3])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plt.rcParams.update({"svg.hashsalt": "verl", "font.size": 11, "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(4.6, 3.3), layout="constrained")
    axes.plot(*series(rows, TRAIN), color="#2f6fde", label="training samples")
    for name, style in ((REWARD, "s"), (HELD_OUT, "o")):
        steps, values = series(rows, name)
        if values:
            label = "held-out words: reward" if name == REWARD else "held-out words: right answers"
            axes.plot(steps, values, style, color="#d9650b", label=label, linestyle="--", linewidth=1, markersize=5)
    axes.set(
        xlabel="step", ylabel="mean reward", ylim=(0, 1.02), title="Quickstart: GRPO, MXFP8 rollout, two CPU cores"
    )
    axes.title.set_fontsize(11)
    axes.grid(color="#e4e7ec")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(output, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
