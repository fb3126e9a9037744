"""Begin of a run's records: config, metrics, timeline and samples in one directory belong to one run.

A run writes no record before all of its processes have started, a checkpoint is loaded and the replicas hold the
weights. An attempt that fails before this leaves the records of the run before it as they are.

    DIRECTORY/config.yaml, metrics.jsonl, ...   the present run
    DIRECTORY/previous_1, previous_2, ...       earlier runs that another run followed from its first step
    FILE.previous, FILE.previous_2, ...         files of this run before it was resumed: a config that has changed, the
                                                timeline; and an earlier timeline outside of the directory
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from verl.config.ppo import PPOConfig
from verl.config.record import CHANGES_FILE, CONFIG_FILE, record_texts, write_record
from verl.timeline.spans import publish_timeline, timeline_file
from verl.utils.tracking.jsonl import GENERATIONS_FILE, METRICS_FILE, read_steps
from verl.utils.tracking.tracker import TENSORBOARD_DIRECTORY

logger = logging.getLogger(__name__)

_RECORDS = (CONFIG_FILE, CHANGES_FILE, METRICS_FILE, GENERATIONS_FILE, TENSORBOARD_DIRECTORY)


def begin_records(config: PPOConfig, directory: Path, *, resume_step: int | None) -> None:
    """Write the config of a run that has started, and move its timeline to its name; keep the files of earlier runs.

    Args:
        config: the whole config.
        directory: the directory of the records.
        resume_step: the step of the checkpoint in `directory` that the run resumes from, so that its records continue
            those there; None for a new run, or one that resumes from another directory.

    Raises:
        OSError: a file cannot be written or renamed.
    """
    timeline = _timeline_of(config, directory)
    if resume_step is not None and _is_of_other_run(directory / METRICS_FILE, resume_step):
        resume_step = None
    if resume_step is not None:
        for name, text in record_texts(config).items():
            path = directory / name
            if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != text:
                _set_aside(path)
    else:
        _keep_earlier_run(config, directory, timeline)
    write_record(config, directory)
    if timeline is not None and timeline_file() is not None:
        if timeline_file() != timeline and os.path.lexists(timeline):
            _set_aside(timeline)
        publish_timeline(timeline)


def _is_of_other_run(metrics: Path, step: int) -> bool:
    """Return True if the metrics lack the step of a checkpoint, which its run has logged before it saved."""
    records = read_steps(metrics)
    return bool(records) and all(record["step"] != step for record in records)


def _timeline_of(config: PPOConfig, directory: Path) -> Path | None:
    """Return the file of the timeline; that of a run with `val_only` is beside its other records."""
    if config.trainer.timeline is None:
        return None
    file = Path(config.trainer.timeline).absolute()
    return directory.absolute() / file.name if config.trainer.val_only else file


def _keep_earlier_run(config: PPOConfig, directory: Path, timeline: Path | None) -> None:
    """Move the records in `directory`, if there are any, into a new directory `previous_N`."""
    metrics = directory / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size == 0:
        return  # that run has logged nothing: the new records replace its own
    found = [path for path in _possible_records(config, directory, timeline) if os.path.lexists(path)]
    if not any(directory / name in found for name in _RECORDS):
        return
    previous = next(
        path for number in itertools.count(1) if not os.path.lexists(path := directory / f"previous_{number}")
    )
    for path in found:
        target = previous / path.relative_to(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    logger.info("the records of an earlier run in %s are now in %s", directory, previous)


def _possible_records(config: PPOConfig, directory: Path, timeline: Path | None) -> Iterator[Path]:
    """Yield the files and directories in `directory` that this run writes too."""
    yield from (directory / name for name in _RECORDS)
    named = [config.trainer.rollout_data_dir, config.trainer.validation_data_dir]
    if timeline is not None and timeline_file() != timeline:
        named.append(str(timeline))
    home = os.path.abspath(directory)
    for path in dict.fromkeys(os.path.abspath(path) for path in named if path):
        if path != home and os.path.commonpath([path, home]) == home:
            yield directory / os.path.relpath(path, home)


def _set_aside(path: Path) -> None:
    """Rename a file to NAME.previous or, if that exists, to NAME.previous_2, ..."""
    names = itertools.chain([".previous"], (f".previous_{number}" for number in itertools.count(2)))
    target = next(other for end in names if not os.path.lexists(other := path.with_name(path.name + end)))
    os.rename(path, target)
    logger.info("%s belonged to an earlier run and is now %s", path, target)
