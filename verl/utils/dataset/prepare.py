"""Conversion of a published dataset to data files with verl's columns, for the scripts in examples/data_preprocess.

A script converts one row; `convert` applies it to all rows and checks the result. Errors name the file and the row.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from verl.extension.paths import expand_user
from verl.utils.dataset.files import read_rows, row_name
from verl.utils.dataset.prompts import check_messages, prefix_errors

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def make_row(question: str, answer: str, *, data_source: str, ability: str, extra_info: Row) -> Row:
    """Return a row in verl's columns: one user message, scored by the rule of its data source."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": question}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": extra_info,
    }


def check_row(row: Row) -> None:
    """Check the columns of a row that training and scoring read.

    Raises:
        ValueError: prompt, data source or ground truth is missing or has a wrong form; the message names the column.
        NotImplementedError: the prompt has images, video or audio.
    """
    check_messages(row.get("prompt"), "prompt")
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise ValueError(f"'data_source' is {source!r}; it must be text, which selects the scorer")
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict):
        raise ValueError(f"'reward_model' is {reward_model!r}; it must be a dict with style and ground_truth")
    truth = reward_model.get("ground_truth")
    if truth is None or not str(truth).strip():
        raise ValueError(f"'reward_model.ground_truth' is {truth!r}; every row needs the correct response")


def text_of(example: Row, column: str) -> str:
    """Return a column of a published row that must hold text.

    Raises:
        ValueError: it is missing, null, empty or not text.
    """
    value = example.get(column)
    if not isinstance(value, str) or not value.strip():
        given = f"is {value!r}" if column in example else f"is missing (the columns are {', '.join(example)})"
        raise ValueError(f"{column!r} {given}; it must be text")
    return value


def convert(files: Sequence[Path], convert_row: Callable[[Row, int], Row | None]) -> list[Row]:
    """Convert the rows of the files, and check the result.

    Args:
        files: the published files.
        convert_row: called with a published row and its number over all files; returns None to skip the row.

    Raises:
        ValueError, NotImplementedError: names the file and the number of the first invalid row.
    """
    converted: list[Row] = []
    number = 0
    for path in files:
        for i, example in enumerate(_examples(path)):
            with prefix_errors(row_name(path, i)):
                row = convert_row(example, number)
                number += 1
                if row is not None:
                    check_row(row)
                    converted.append(row)
    return converted


def _examples(path: Path) -> Iterable[Row]:
    if path.suffix == ".csv":
        try:
            return pyarrow.csv.read_csv(
                path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
            ).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data file {path}: cannot be read as CSV ({error}); write it again") from error
    rows = read_rows(path)
    return (rows[i] for i in range(len(rows)))


def write_splits(directory: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write one Parquet file per split atomically, and print its number of rows."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        _write(directory / f"{split}.parquet", rows)


def _write(path: Path, rows: Sequence[Row]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        pq.write_table(pa.Table.from_pylist(list(rows)), unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    sys.stdout.write(f"{path}: {len(rows)} rows\n")


def published_files(
    local: str | None, repo: str, *, folder: str, splits: dict[str, tuple[str, ...]]
) -> dict[str, list[Path]]:
    """Return the files of each split, from this machine or from the Hugging Face hub.

    Args:
        local: a directory, or one file for the first split; None downloads `repo`.
        repo: name of the dataset on the hub.
        folder: name of the folder to use if several folders contain the splits.
        splits: for each split, the possible beginnings of its file names.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: there are no such files, or they are in several folders.
        OSError: the hub is not reachable.
    """
    root = download(repo) if local is None else expand_user(local)
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ValueError(f"{root}: suffix {root.suffix!r} is not supported; use one of {', '.join(SUFFIXES)}")
        return {next(iter(splits)): [root]}
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; pass a file or a directory with the files of {repo}")
    found: dict[Path, dict[str, list[Path]]] = {}
    for path in sorted(path for suffix in SUFFIXES for path in root.rglob(f"*{suffix}")):
        split = next((name for name, starts in splits.items() if path.name.lower().startswith(starts)), None)
        if split is not None:
            found.setdefault(path.parent, {}).setdefault(split, []).append(path)
    if not found:
        names = ", ".join(f"{start}*" for starts in splits.values() for start in starts)
        raise ValueError(f"{root} has no data file named {names} ({', '.join(SUFFIXES)}); pass the directory of {repo}")
    chosen = [parent for parent in found if parent.name == folder] if len(found) > 1 else list(found)
    if len(chosen) != 1:
        raise ValueError(f"{root} has data in several folders: {', '.join(map(str, sorted(found)))}; pass one of them")
    return found[chosen[0]]


def download(repo: str) -> Path:
    """Download the data files of a dataset into the cache of the hub, and return their directory.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: the download failed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            "the download needs huggingface_hub, a dependency of transformers: pip install transformers"
        ) from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except OSError as error:
        raise OSError(
            f"cannot download {repo} ({str(error).splitlines()[0]}); on a machine with network access run `hf download "
            f"{repo} --repo-type dataset --local-dir DIR`, and pass --local_dataset_path DIR here"
        ) from error


def make_parser(description: str | None, save_dir: str) -> argparse.ArgumentParser:
    """Build the command line of a script that converts a published dataset."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument(
        "--local_dataset_path",
        metavar="PATH",
        help=f"the published dataset on this machine, a directory or one file ({', '.join(SUFFIXES)}); default: "
        "download it from the Hugging Face hub",
    )
    add_save_dir(parser, save_dir)
    return parser


def add_save_dir(parser: argparse.ArgumentParser, save_dir: str) -> None:
    """Add the option for the output directory."""
    parser.add_argument(
        "--local_save_dir",
        "--local_dir",
        type=lambda text: expand_user(text),
        default=expand_user(save_dir),
        metavar="DIR",
        help=f"directory for train.parquet and test.parquet (default: {save_dir})",
    )
