"""From a dataset as it is published to data files with verl's columns; the scripts in examples/data_preprocess use it.

A script says what a row becomes, `convert` applies that and checks the result, naming file and row of the first fault.
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

from verl.utils.dataset.files import place, read_rows
from verl.utils.dataset.prompts import check_messages, located

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")


def make_row(question: str, answer: str, *, data_source: str, ability: str, extra_info: Row) -> Row:
    """A row in verl's columns: one message of the user, scored by the rule of its data source."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": question}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": extra_info,
    }


def check_row(row: Row) -> None:
    """Whether a row has what training and scoring read.

    Raises:
        ValueError: no prompt, data source or answer, or one of another form; the message names the column.
        NotImplementedError: a prompt with images, video or audio.
    """
    check_messages(row.get("prompt"), "prompt")
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        raise ValueError(f"'data_source' is {source!r}; it has to be text, which chooses the scorer")
    judge = row.get("reward_model")
    if not isinstance(judge, dict):
        raise ValueError(f"'reward_model' is {judge!r}; it has to be a dict with style and ground_truth")
    truth = judge.get("ground_truth")
    if truth is None or not str(truth).strip():
        raise ValueError(f"'reward_model.ground_truth' is {truth!r}; every row needs the right answer")


def text_of(example: Row, column: str) -> str:
    """A column of a published row that has to hold text.

    Raises:
        ValueError: it is absent, null, empty or no text.
    """
    value = example.get(column)
    if not isinstance(value, str) or not value.strip():
        given = f"is {value!r}" if column in example else f"is missing (the columns are {', '.join(example)})"
        raise ValueError(f"{column!r} {given}; it has to be text")
    return value


def convert(files: Sequence[Path], row_of: Callable[[Row, int], Row | None]) -> list[Row]:
    """What the rows of the files become, checked.

    Args:
        row_of: gets a published row and its number over all files; None leaves the row out.

    Raises:
        ValueError, NotImplementedError: the first row that has a fault, by file and number.
    """
    made: list[Row] = []
    number = 0
    for path in files:
        for i, example in enumerate(_examples(path)):
            with located(place(path, i)):
                row = row_of(example, number)
                number += 1
                if row is not None:
                    check_row(row)
                    made.append(row)
    return made


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
    """Write a Parquet file of each split, whole or not at all, and say so."""
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
    """The files of each split, from this machine or from the Hugging Face hub.

    Args:
        local: a directory, or one file, which is then the first split; None downloads `repo`.
        repo: name of the dataset on the hub.
        folder: where several folders hold the splits, the name of the one to take.
        splits: by split: how names of its files begin.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: no such files there, or in several folders.
        OSError: the hub cannot be reached.
    """
    root = download(repo) if local is None else Path(local).expanduser()
    if root.is_file():
        if root.suffix not in SUFFIXES:
            raise ValueError(f"{root}: its suffix {root.suffix!r} is none of {', '.join(SUFFIXES)}")
        return {next(iter(splits)): [root]}
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist; give a file or a directory with the files of {repo}")
    found: dict[Path, dict[str, list[Path]]] = {}
    for path in sorted(path for suffix in SUFFIXES for path in root.rglob(f"*{suffix}")):
        split = next((name for name, starts in splits.items() if path.name.lower().startswith(starts)), None)
        if split is not None:
            found.setdefault(path.parent, {}).setdefault(split, []).append(path)
    if not found:
        names = ", ".join(f"{start}*" for starts in splits.values() for start in starts)
        raise ValueError(f"{root} has no data file named {names} ({', '.join(SUFFIXES)}); give the directory of {repo}")
    chosen = [parent for parent in found if parent.name == folder] if len(found) > 1 else list(found)
    if len(chosen) != 1:
        raise ValueError(f"{root} has data in several folders: {', '.join(map(str, sorted(found)))}; give one of them")
    return found[chosen[0]]


def download(repo: str) -> Path:
    """The data files of a dataset of the hub, in the hub's own cache.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: the dataset cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            "downloading needs huggingface_hub, which transformers brings: pip install transformers"
        ) from error
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]))
    except OSError as error:
        raise OSError(
            f"{repo} cannot be downloaded ({str(error).splitlines()[0]}); where there is a network, run `hf download "
            f"{repo} --repo-type dataset --local-dir DIR`, and give --local_dataset_path DIR here"
        ) from error


def parser(description: str | None, save_dir: str) -> argparse.ArgumentParser:
    """verl's options of a script that converts a published dataset."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    made.add_argument(
        "--local_dataset_path",
        metavar="PATH",
        help=f"the published dataset on this machine, a directory or one file ({', '.join(SUFFIXES)}); without it, it "
        "is downloaded from the Hugging Face hub",
    )
    add_save_dir(made, save_dir)
    return made


def add_save_dir(made: argparse.ArgumentParser, save_dir: str) -> None:
    """Where a script writes to."""
    made.add_argument(
        "--local_save_dir",
        "--local_dir",
        type=lambda text: Path(text).expanduser(),
        default=Path(save_dir).expanduser(),
        metavar="DIR",
        help=f"where train.parquet and test.parquet go ({save_dir})",
    )
