"""Rows of Parquet, JSON and JSON-lines files, with errors that name the file and the row. Imports no torch."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_SUFFIXES = (".parquet", ".json", ".jsonl")
_ROWS_PER_BATCH = 65536


def row_name(path: Path, row: int) -> str:
    """Return the name of a row in error messages."""
    return f"{path}, row {row} (counted from 0)"


class ParquetRows:
    """The rows of one Parquet file, stored as Arrow columns; a row is converted to Python objects on access."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                # Read in batches: Arrow cannot read a nested column of more than 2 GiB at once.
                batches = list(file.iter_batches(batch_size=_ROWS_PER_BATCH))
                self.table = pa.Table.from_batches(batches, schema=file.schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_unreadable_parquet(path, error)) from error
        self.columns = [name for name in self.table.column_names if not name.startswith("__index_level_")]

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.table.select(self.columns).slice(row, 1).to_pylist()[0]

    def first_row(self, column: str, *, filled: bool) -> int | None:
        """Return the first row with a value in `column` (`filled`) or without one; None if there is no such row.

        Null and an empty list are not values.
        """
        values = self.table.column(column)
        mask = pc.is_valid(values)
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            mask = pc.and_(mask, pc.fill_null(pc.greater(pc.list_value_length(values), 0), False))
        found = pc.index(mask, pa.scalar(filled)).as_py()
        return None if found < 0 else found


class JsonRows:
    """The rows of one JSON file: an array of objects, or one object per line (JSON lines), under either suffix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
        self._rows = list(_json_array(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text))
        for i, row in enumerate(self._rows):
            if not isinstance(row, dict):
                raise ValueError(f"{row_name(path, i)}: is a JSON {type(row).__name__}; every row must be an object")
        self.columns = list(dict.fromkeys(key for row in self._rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._rows[row])

    def first_row(self, column: str, *, filled: bool) -> int | None:
        """Return the first row with a value in `column` (`filled`) or without one; None if there is no such row.

        Null, a missing key and an empty list are not values.
        """
        flags = (row.get(column) is not None and row[column] != [] for row in self._rows)
        return next((i for i, flag in enumerate(flags) if flag == filled), None)


def data_paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the given path or paths, with `~` expanded.

    Raises:
        FileNotFoundError: a file does not exist, or is a directory.
        ValueError: no file is given, or a suffix is not .parquet, .json or .jsonl.
    """
    paths = [Path(file).expanduser() for file in ([files] if isinstance(files, str | Path) else files or [])]
    if not paths:
        raise ValueError("no data file is given: set data.train_files (or data.val_files) to a path or a list of paths")
    for path in paths:
        if not os.path.isfile(path):
            problem = "is a directory; list its files" if os.path.isdir(path) else "does not exist; check the path"
            raise FileNotFoundError(f"data file {path} {problem}")
        if path.suffix not in _SUFFIXES:
            raise ValueError(
                f"data file {path}: suffix {path.suffix!r} is not supported; use one of {', '.join(_SUFFIXES)}"
            )
    return paths


def read_rows(path: Path) -> ParquetRows | JsonRows:
    """Return all rows of one file.

    Raises:
        ValueError: the file is empty, has no row, is truncated, or is not in the format of its suffix.
    """
    _require_bytes(path)
    rows = ParquetRows(path) if path.suffix == ".parquet" else JsonRows(path)
    if not len(rows):
        raise ValueError(f"data file {path} has no rows; write it again or remove it from the list")
    return rows


def count_rows(files: str | Path | Sequence[str | Path]) -> int:
    """Return the number of rows of all files together.

    Only the footer of a Parquet file is read: this is fast, and it detects a truncated file.

    Raises:
        FileNotFoundError, ValueError: see `data_paths` and `read_rows`.
    """
    total = 0
    for path in data_paths(files):
        if path.suffix != ".parquet":
            total += len(read_rows(path))
            continue
        _require_bytes(path)
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_unreadable_parquet(path, error)) from error
        if not rows:
            raise ValueError(f"data file {path} has no rows; write it again or remove it from the list")
        total += rows
    return total


def _require_bytes(path: Path) -> None:
    if path.stat().st_size == 0:
        raise ValueError(f"data file {path} is empty (0 bytes); write it again")


def _unreadable_parquet(path: Path, error: Exception) -> str:
    first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"data file {path} ({path.stat().st_size} bytes) is not a complete Parquet file ({first_line}); it was "
        "probably truncated while it was written or copied: write or copy it again"
    )


def _json_array(path: Path, text: str) -> list[Any]:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {path}: invalid JSON at line {error.lineno} ({error.msg})") from error


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Not str.splitlines, which also splits at characters such as U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"data file {path}: line {number} is not valid JSON ({error.msg}); a .json or .jsonl file must hold "
                "one object per line, or one array of objects"
            ) from error
