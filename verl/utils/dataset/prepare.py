"""Conversion of a published dataset to data files with verl's columns, for the scripts in examples/data_preprocess.

A script converts one row; `convert` applies it to all rows and checks the result. Errors name the file and the row.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from verl.extension.paths import expand_user
from verl.utils.atomic_io import atomic_file
from verl.utils.dataset.files import read_rows, require_unique_names, row_name
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
            table = pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data file {path}: cannot be read as CSV ({error}); write it again") from error
        require_unique_names(path, table.column_names)
        return table.to_pylist()
    rows = read_rows(path)
    return (rows[i] for i in range(len(rows)))


def write_splits(directory: Path, splits: Mapping[str, Sequence[Row]]) -> None:
    """Write one Parquet file per split, and print its number of rows. After an error every file is as it was before.

    Raises:
        ValueError: a split has no rows, or rows that one Parquet file cannot hold; the message names the split.
    """
    tables = {split: _table(split, rows) for split, rows in splits.items()}
    directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # All files are complete before the first one gets its name.
        for split, table in tables.items():
            unfinished = stack.enter_context(atomic_file(directory / f"{split}.parquet"))
            with prefix_errors(f"{directory / split}.parquet"), _arrow_errors():
                pq.write_table(table, unfinished)
    for split, table in tables.items():
        sys.stdout.write(f"{directory / split}.parquet: {table.num_rows} rows\n")


def _table(split: str, rows: Sequence[Row]) -> pa.Table:
    if not rows:
        raise ValueError(f"the split {split} has no rows; a run needs at least one")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        # Parquet has no type for a dict without fields.
        values = [None if row.get(name) == {} else row.get(name) for row in rows]
        with prefix_errors(f"the split {split}, column {name!r}"), _arrow_errors():
            columns[name] = pa.array(values)
    return pa.table(columns)


@contextmanager
def _arrow_errors() -> Iterator[None]:
    """Turn Arrow's errors about values, which are of several kinds, into a ValueError."""
    try:
        yield
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Parquet cannot hold these values ({reason}); give all rows values of the same type"
        ) from error


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


def row_count(text: str) -> int:
    """Return the number of rows that a command line gives, for `type` of argparse; at least 1."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} rows; use at least 1")
    return count


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
