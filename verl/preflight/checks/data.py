"""Data files: there, whole, not empty, with the prompt column. Parquet files are judged by their footer alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings
from verl.utils.dataset.files import count_rows, data_paths
from verl.utils.user_files import file_problem


@dataclass(frozen=True)
class DataInfo:
    """Rows that are used, None where a dataset class of the user's decides or the files cannot be read."""

    train: int | None
    val: int | None


def check_data(config: PPOConfig, found: Findings) -> DataInfo:
    """Read what the files say about themselves."""
    data = config.data
    if data.custom_cls.path:
        _check_custom_class(config, found)
        return DataInfo(None, None)
    if data.trust_remote_code and not config.actor_rollout_ref.model.trust_remote_code:
        found.errors.append(
            "data.trust_remote_code=True: actor_rollout_ref.model.trust_remote_code decides for the tokenizer too; set "
            "that to True"
        )
    train = _rows("data.train_files", data.train_files, data.prompt_key, found)
    val = _rows("data.val_files", data.val_files, data.prompt_key, found)
    for name, limit in (("train", data.train_max_samples), ("val", data.val_max_samples)):
        if limit == 0:
            found.errors.append(f"data.{name}_max_samples=0: use at least 1, or -1 for all")
    train, val = _limited(train, data.train_max_samples), _limited(val, data.val_max_samples)
    for name in ("train_batch_size", "gen_batch_size"):
        size = getattr(data, name)
        if train is not None and size is not None and train < size:
            found.errors.append(f"data.{name}={size}: data.train_files has only {train} prompts; use at most {train}")
    return DataInfo(train, val)


def _limited(rows: int | None, limit: int) -> int | None:
    return rows if rows is None or limit < 1 else min(rows, limit)


def _rows(field: str, files: str | list[str] | None, prompt_key: str, found: Findings) -> int | None:
    if files is None:
        return None  # reported as not set
    try:
        paths = data_paths(files)
    except FileNotFoundError as error:
        found.missing(f"{field}: {error}")
        return None
    except (OSError, ValueError) as error:
        found.errors.append(f"{field}: {error}")
        return None
    counts = [_file(field, path, prompt_key, found) for path in paths]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _file(field: str, path: Path, prompt_key: str, found: Findings) -> int | None:
    try:
        rows = count_rows(path)
        columns = _columns(path)
    except (ValueError, OSError) as error:
        found.errors.append(f"{field}: {error}")
        return None
    if prompt_key not in columns:
        found.errors.append(
            f"{field}: {path} has no column {prompt_key!r}; its columns are {', '.join(columns)}: set data.prompt_key "
            "to the one that holds the messages, or add it"
        )
        return None
    return rows


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        try:
            return list(pq.read_schema(path).names)
        except pa.ArrowException as error:
            raise ValueError(f"data file {path}: its schema cannot be read ({error}); write it again") from error
    text = path.read_text(encoding="utf-8").lstrip()
    row = json.loads(text)[0] if text[:1] == "[" else json.loads(text.split("\n", 1)[0])
    if not isinstance(row, dict):
        raise ValueError(f"data file {path}: row 0 is a JSON {type(row).__name__}; every row has to be an object")
    return list(row)


def column_names(files: str | list[str] | None) -> set[str]:
    """Columns that at least one of the files has; those that cannot be read count as having none."""
    found: set[str] = set()
    try:
        for path in data_paths(files) if files else []:
            found.update(_columns(path))
    except (FileNotFoundError, ValueError, OSError):
        pass  # `check_data` reports it
    return found


def _check_custom_class(config: PPOConfig, found: Findings) -> None:
    custom = config.data.custom_cls
    assert custom.path is not None
    if not custom.name:
        found.errors.append(f"data.custom_cls.name is not set, but data.custom_cls.path={custom.path}; name the class")
    problem = file_problem(custom.path)
    if problem is not None:
        found.errors.append(f"data.custom_cls.path={custom.path}: {problem}; give the Python file of the class")
