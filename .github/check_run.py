"""Compare a run with stored bounds: `python .github/check_run.py RUN_DIR NAME [--bounds FILE]`.

RUN_DIR is the run's `trainer.default_local_dir`, which contains `metrics.jsonl`. NAME is a section of the bounds file,
with limits for statistics of metrics:

    grpo-ascend:
      steps: 20                                  # the last logged step
      metrics:
        critic/score/mean:
          rise: {min: 0.1}                       # first, last, rise (last - first), median, min, max over the steps

Exit status: 0 if all bounds hold; 1 if a value is out of bounds or was not logged; 2 if the section is missing or
invalid.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from verl.utils.tracking import read_steps

BOUNDS = Path(__file__).with_name("bounds.yaml")
STATISTICS = {
    "first": lambda values: values[0],
    "last": lambda values: values[-1],
    "rise": lambda values: values[-1] - values[0],
    "median": statistics.median,
    "min": min,
    "max": max,
}


def load_bounds(path: Path, name: str) -> Mapping[str, Any]:
    """Read a section of a bounds file.

    Raises:
        ValueError: there is no such section, or it has an unknown key, statistic or bound.
    """
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    if name not in sections:
        raise ValueError(f"{path} has no section {name}; it has {', '.join(sections)}")
    section = sections[name]
    if set(section) != {"steps", "metrics"}:
        raise ValueError(f"{path}: {name} has the keys {sorted(section)}; they must be steps and metrics")
    for metric, wanted in section["metrics"].items():
        for statistic, bound in wanted.items():
            if statistic not in STATISTICS or not bound or not set(bound) <= {"min", "max"}:
                known = ", ".join(STATISTICS)
                raise ValueError(f"{path}: {name}: {metric}: {statistic}: {bound}; use one of {known} with min or max")
    return section


def compare(records: Sequence[Mapping[str, Any]], section: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Return a line of text for each bound, and whether the bound holds."""
    last = max((record["step"] for record in records), default=0)
    lines = [(f"steps: {last}, expected {section['steps']}", last == section["steps"])]
    for metric, wanted in section["metrics"].items():
        values = [record["data"][metric] for record in records if metric in record.get("data", {})]
        if not values:
            lines.append((f"{metric}: was not logged", False))
            continue
        for statistic, bound in wanted.items():
            # min and max could skip a NaN; a NaN is always out of bounds.
            value = math.nan if any(map(math.isnan, values)) else STATISTICS[statistic](values)
            least, most = bound.get("min", float("-inf")), bound.get("max", float("inf"))
            lines.append((f"{metric}: {statistic} {value:.4g}, bounds {least:g} to {most:g}", least <= value <= most))
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("name", metavar="NAME", help="section of the bounds file")
    parser.add_argument("--bounds", type=Path, default=BOUNDS, metavar="FILE")
    options = parser.parse_args(arguments)
    try:
        section = load_bounds(options.bounds, options.name)
    except ValueError as error:
        sys.stderr.write(f"check_run.py: {error}\n")
        return 2
    lines = compare(read_steps(options.run / "metrics.jsonl"), section)
    for text, holds in lines:
        sys.stdout.write(f"{'ok  ' if holds else 'FAIL'}  {text}\n")
    return 0 if all(holds for _, holds in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
