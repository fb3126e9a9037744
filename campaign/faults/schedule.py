"""The faults of each run of the campaign, by seed and number."""

from __future__ import annotations

import dataclasses
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.faults.catalog import Fault, catalog
from campaign.faults.run import START_S, WATCH_S, FaultedRun, Row, Settings, Violated

LIVES = 4  # starts of a run, before the one in which it reaches its end
FAULTS = 8  # faults that it survives in each of them


@dataclass(frozen=True)
class Life:
    """A part of a run from a start to an end: a fault in the start, or those that it survives and one that ends it."""

    in_start: Fault | None
    survived: list[Fault]
    fatal: Fault | None


def schedule(rng: random.Random, lives: int = LIVES, faults: int = FAULTS) -> list[Life]:
    """Choose the lives of a run."""
    survived, fatal, starting = catalog(WATCH_S)
    chosen = []
    for number in range(lives):
        if number and rng.random() < 0.25:
            chosen.append(Life(rng.choice(starting), [], None))
        chosen.append(Life(None, rng.sample(survived, faults), rng.choice(fatal)))
    return chosen


def play(run: FaultedRun, lives: list[Life], rows: list[Row]) -> None:
    """Let a run live its lives; append a row for each fault. A violation ends the life."""
    for life in lives:
        if life.in_start is not None:
            rows.append(run.strike_start(life.in_start))
        else:
            run.start()
            run.wait_for_steps(2, START_S)
            for fault in [*life.survived, *([] if life.fatal is None else [life.fatal])]:
                rows.append(run.strike(fault))
                if run.process.poll() is not None or rows[-1].violations:
                    break
        run.kill()


def run_number(number: int, seed: int, folder: Path | None = None, **size: int) -> dict[str, Any]:
    """Carry out one run of the campaign.

    Args:
        folder: parent of the run's directory, which is deleted unless an invariant was violated.
        size: see `schedule`.

    Returns:
        Record of the run: `settings`, `seconds`, a row for each of its `faults`, `violations` of the run as a whole,
        and the `directory` if it was kept.
    """
    rng = random.Random(f"{seed}/{number}")
    settings = Settings.draw(rng)
    lives = schedule(rng, **size)
    root = Path(tempfile.mkdtemp(prefix="campaign-", dir=folder))
    rows: list[Row] = []
    started = time.monotonic()
    run = FaultedRun(root, settings, rng)
    try:
        play(run, lives, rows)
        problems = run.finish()
    except Violated as violation:
        problems = [str(violation)]
    finally:
        run.kill()
    keep = bool(problems) or any(row.violations for row in rows)
    if not keep:
        shutil.rmtree(root)
    return {
        "run": number,
        "settings": dataclasses.asdict(settings),
        "seconds": round(time.monotonic() - started),
        "faults": [dataclasses.asdict(row) for row in rows],
        "violations": problems,
        "directory": str(root) if keep else None,
    }
