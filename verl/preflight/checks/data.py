"""Checks of `data`: files, columns and numbers of rows. Of a Parquet file only the footer is read.

data_rows.py checks the content of rows and `data.max_prompt_length`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.config.stream import carries_prompts, carrying_key
from verl.extension.paths import expand_user
from verl.extension.user_class import UserClassError, check_class
from verl.extension.user_files import file_problem
from verl.preflight.findings import Findings
from verl.utils.dataset.files import column_names, count_rows, data_paths
from verl.utils.dataset.sampler_class import sampler_problem


@dataclass(frozen=True)
class DataInfo:
    """Numbers of rows that the run uses; None if a dataset class decides or the files cannot be read.

    Attributes:
        train, val: rows of the training and the validation data.
        train_per_epoch: rows in one pass over the training data; None if a dataset class or a sampler decides.
    """

    train: int | None
    val: int | None
    train_per_epoch: int | None


def check_data(config: PPOConfig, found: Findings) -> DataInfo:
    """Check the data files, or the dataset class, and return the numbers of rows."""
    data = config.data
    _check_sampler(config, found)
    if data.custom_cls.path:
        _check_custom_class(data.custom_cls.path, data.custom_cls.name, found)
        return DataInfo(None, None, None)
    if data.trust_remote_code and not config.actor_rollout_ref.model.trust_remote_code:
        found.errors.append(
            "data.trust_remote_code=True: actor_rollout_ref.model.trust_remote_code also decides about the tokenizer; "
            "set actor_rollout_ref.model.trust_remote_code=True"
        )
    train = _check_files("data.train_files", data.train_files, data.prompt_key, found)
    val = _check_files("data.val_files", data.val_files, data.prompt_key, found)
    for name, limit in (("train", data.train_max_samples), ("val", data.val_max_samples)):
        if limit == 0:
            found.add_size_error(f"data.{name}_max_samples=0: must be at least 1, or -1 for all rows")
    train, val = _limited(train, data.train_max_samples), _limited(val, data.val_max_samples)
    if config.async_training.enable:
        _check_prompts_of_run(config, train, found)
        return DataInfo(train, val, train if data.sampler.class_path is None else None)
    for name, size in (("train_batch_size", data.train_batch_size), ("gen_batch_size", data.gen_batch_size)):
        if data.sampler.class_path is None and train is not None and size is not None and train < size:
            found.add_size_error(f"data.{name}={size}: data.train_files has only {train} prompts; use at most {train}")
    return DataInfo(train, val, train if data.sampler.class_path is None else None)


def _check_sampler(config: PPOConfig, found: Findings) -> None:
    section = config.data.sampler
    if section.class_path is None:
        for name, value in section.kwargs.items():
            found.errors.append(
                f"data.sampler.{name}={show(value)}: data.sampler.class_path is not set, so there is no sampler; set "
                "it to the Python file of the class, or leave this key out"
            )
        return
    problem = sampler_problem(section)
    if problem is not None:
        found.errors.append(problem)
    if carries_prompts(config):
        found.errors.append(
            f"data.sampler.class_path={section.class_path} with {carrying_key(config)}: not supported, because prompts "
            "in progress cannot be drawn again from a sampler; use one of the two"
        )
    found.notes.append(
        f"data.sampler.class_name={section.class_name} chooses the training prompts; data.shuffle and data.seed have "
        "an effect on their order only if it reads them"
    )


def _check_prompts_of_run(config: PPOConfig, rows: int | None, found: Findings) -> None:
    """Check that a fully asynchronous run, whose steps may cross the end of an epoch, has a step."""
    step, epochs = config.data.train_batch_size, config.trainer.total_epochs
    if rows is not None and not config.trainer.total_training_steps and rows * epochs < step:
        found.add_size_error(
            f"trainer.total_epochs={epochs}: data.train_files has {rows} prompts, and a training step takes {step}; "
            f"use at least {-(-step // max(1, rows))}"
        )


def _limited(rows: int | None, limit: int) -> int | None:
    return rows if rows is None or limit < 1 else min(rows, limit)


def _check_files(field: str, files: str | list[str] | None, prompt_key: str, found: Findings) -> int | None:
    """Return the number of rows of all files; None after an error."""
    if files is None:
        return None  # `value_problems` reports it
    try:
        paths = data_paths(files)
    except FileNotFoundError as error:
        found.add_missing_file(f"{field}: {error}")
        return None
    except (OSError, ValueError) as error:
        found.errors.append(f"{field}: {error}")
        return None
    counts = [_check_file(field, path, prompt_key, found) for path in paths]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _check_file(field: str, path: Path, prompt_key: str, found: Findings) -> int | None:
    """Return the number of rows of one file; None after an error."""
    try:
        rows = count_rows(path)
        columns = column_names(path)
    except (ValueError, OSError) as error:
        found.errors.append(f"{field}: {error}")
        return None
    if prompt_key not in columns:
        found.errors.append(
            f"{field}: {path} has no column {prompt_key!r}; set data.prompt_key to the column that holds the messages, "
            f"or add this column (columns: {', '.join(columns)})"
        )
        return None
    return rows


def columns_of_all(files: str | list[str] | None) -> set[str]:
    """Return the columns of all files together; files that cannot be read add none."""
    found: set[str] = set()
    try:
        for path in data_paths(files) if files else []:
            found.update(column_names(path))
    except (FileNotFoundError, ValueError, OSError):
        pass  # `check_data` reports it
    return found


def _check_custom_class(path: str, name: str | None, found: Findings) -> None:
    if not name:
        found.errors.append(f"data.custom_cls.name is not set: give the class's name in data.custom_cls.path={path}")
    problem = file_problem(path)
    if problem is not None:
        found.errors.append(f"data.custom_cls.path={path}: {problem}; give the Python file of the dataset class")
    elif name and path.endswith(".py"):
        try:
            check_class(f"{os.path.abspath(expand_user(path))}:{name}", Path.cwd())
        except UserClassError as error:
            found.errors.append(f"data.custom_cls.name={name}: {error}")
