"""Rows of Parquet, JSON and JSON-lines files, with errors that name the file and the row. Imports no torch."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from verl.extension.paths import expand_user
from verl.utils.dataset.arrow_values import binary_part, converter, is_json, is_list
from verl.utils.text import valid_value, without_repeated_keys

logger = logging.getLogger(__name__)

_SUFFIXES = (".parquet", ".json", ".jsonl")
_ROWS_PER_BATCH = 65536
_ROWS_PER_CONVERSION = 1024
# Errors of a single value: text that is not UTF-8 or not JSON, a time that Python cannot represent, an unknown time
# zone (LookupError).
_UNREADABLE = (ValueError, OverflowError, RecursionError, LookupError, pa.ArrowException)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def require_unique_names(path: Path, columns: Sequence[str]) -> None:
    """Check that no two columns have the same name; ValueError otherwise."""
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"data file {path}: several columns have the name {', '.join(twice)}; rename them")


def row_name(path: Path, row: int) -> str:
    """Return the name of a row in error messages."""
    return f"{path}, row {row} (counted from 0)"


class ParquetRows:
    """The rows of one Parquet file, stored as Arrow columns; a row is converted to Python objects on access.

    Args:
        path: the file.
        messages: name of the column of messages; the null fields that Parquet adds to messages are dropped.
        head: read only the first batch of rows.
    """

    def __init__(self, path: Path, messages: str | None = None, *, head: bool = False) -> None:
        self.path = path
        self.has_warned = False
        try:
            with pq.ParquetFile(path) as file:
                # Read in batches: Arrow cannot read a nested column of more than 2 GiB at once.
                batches = list(islice(file.iter_batches(batch_size=_ROWS_PER_BATCH), 1 if head else None))
                table = pa.Table.from_batches(batches, schema=file.schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_unreadable_parquet(path, error)) from error
        self.columns = [name for name in table.column_names if not name.startswith("__index_level_")]
        require_unique_names(path, self.columns)
        self._table = table.select(self.columns)
        self._converters = {
            field.name: convert
            for field in self._table.schema
            if (convert := converter(field, drop_padding=field.name == messages)) is not None
        }

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return next(self.read(row, 1, self.columns))

    def read(self, start: int, count: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield `count` rows from row `start`, or all that are left, with these columns.

        Raises:
            ValueError: a value cannot be read; names the row and the column.
        """
        for part in range(start, min(start + count, len(self)), _ROWS_PER_CONVERSION):
            size = min(_ROWS_PER_CONVERSION, start + count - part)
            table = self._table.slice(part, size)
            try:
                values = {name: self._values(name, table.column(name), part) for name in columns}
            except _UNREADABLE:
                if size > 1:
                    for row in range(part, part + size):
                        yield from self.read(row, 1, columns)
                    continue
                raise self._unreadable_value(part, columns) from None
            for row in range(table.num_rows):
                yield {name: column[row] for name, column in values.items()}

    def _values(self, name: str, column: pa.ChunkedArray, start: int) -> list[Any]:
        convert = self._converters.get(name)
        if convert is None:
            return column.to_pylist()
        converted = [convert(value) for value in column.to_pylist()]
        # Only JSON text can contain them: Arrow's own text is UTF-8.
        return _without_surrogates(self, converted, start)

    def _unreadable_value(self, row: int, columns: Sequence[str]) -> ValueError:
        for name in columns:
            try:
                self._values(name, self._table.column(name).slice(row, 1), row)
            except _UNREADABLE as error:
                return ValueError(
                    f"{row_name(self.path, row)}: column {name!r} ({self._table.schema.field(name).type}) holds a "
                    f"value that cannot be read ({error}); correct it, or remove the column"
                )
        raise AssertionError("every value of the row can be read")

    def first_row(self, column: str, *, filled: bool) -> int | None:
        """Return the first row with a value in `column` (`filled`) or without one; None if there is no such row.

        Null and an empty list are not values.
        """
        values = self._table.column(column)
        if is_json(self._table.schema.field(column)):
            flags = (_is_filled(row[column]) for row in self.read(0, len(self), [column]))
            return next((i for i, flag in enumerate(flags) if flag == filled), None)
        mask = pc.is_valid(values)
        if is_list(values.type):
            mask = pc.and_(mask, pc.fill_null(pc.greater(pc.list_value_length(values), 0), False))
        found = pc.index(mask, pa.scalar(filled)).as_py()
        return None if found < 0 else found

    def require_text(self, columns: Iterable[str]) -> None:
        """Check that none of the columns holds bytes, which neither a chat template nor a scorer understands.

        Raises:
            ValueError: one does; names the file and the part of the column.
        """
        for name in columns:
            found = binary_part(self._table.schema.field(name)) if name in self.columns else None
            if found is not None:
                raise ValueError(
                    f"data file {self.path}: {found} holds bytes, expected text; write the column as text (decode it "
                    "with .decode('utf-8'), or cast BLOB to VARCHAR)"
                )


class JsonRows:
    """The rows of one JSON file: an array of objects, or one object per line (JSON lines), under either suffix."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.has_warned = False
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from error
        self._rows = list(_json_array(path, text) if text.lstrip()[:1] == "[" else _json_lines(path, text))
        if _SURROGATE.search(text):
            self._rows = _without_surrogates(self, self._rows, 0)
        for i, row in enumerate(self._rows):
            if not isinstance(row, dict):
                raise ValueError(f"{row_name(path, i)}: is a JSON {type(row).__name__}; every row must be an object")
        self.columns = list(dict.fromkeys(key for row in self._rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return dict(self._rows[row])

    def read(self, start: int, count: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield `count` rows from row `start`, or all that are left, with those of these columns that they have."""
        for row in self._rows[start : start + count]:
            yield {name: row[name] for name in columns if name in row}

    def first_row(self, column: str, *, filled: bool) -> int | None:
        """Return the first row with a value in `column` (`filled`) or without one; None if there is no such row.

        Null, a missing key and an empty list are not values.
        """
        flags = (_is_filled(row.get(column)) for row in self._rows)
        return next((i for i, flag in enumerate(flags) if flag == filled), None)

    def require_text(self, columns: Iterable[str]) -> None:
        """Do nothing: JSON has no bytes."""


def _without_surrogates(rows: ParquetRows | JsonRows, values: list[Any], start: int) -> list[Any]:
    """Return `valid_value` of each value, and warn about the first one that differs.

    Args:
        rows: the file.
        values: one per row.
        start: row of the first value.
    """
    valid = [valid_value(value) for value in values]
    changed = next((i for i, (value, new) in enumerate(zip(values, valid, strict=True)) if value != new), None)
    if changed is not None and not rows.has_warned:
        rows.has_warned = True
        logger.warning(
            "%s: its text holds half of a character (a lone surrogate such as \\ud83d), which no tokenizer accepts; it "
            "is read as U+FFFD, and so are all others of the file",
            row_name(rows.path, start + changed),
        )
    return valid


def _is_filled(value: Any) -> bool:
    return value is not None and value != []


def data_paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the given path or paths, with `~` expanded.

    Raises:
        FileNotFoundError: a file does not exist, or is a directory.
        ValueError: no file is given, or a suffix is not .parquet, .json or .jsonl.
    """
    paths = [expand_user(file) for file in ([files] if isinstance(files, str | Path) else files or [])]
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


def read_rows(path: Path, messages: str | None = None, *, head: bool = False) -> ParquetRows | JsonRows:
    """Return all rows of one file.

    Args:
        path: the file.
        messages: see `ParquetRows`.
        head: the first rows are enough; of a large Parquet file the others are not read.

    Raises:
        ValueError: the file is empty, has no row, is truncated, or is not in the format of its suffix.
    """
    _require_bytes(path)
    rows = ParquetRows(path, messages, head=head) if path.suffix == ".parquet" else JsonRows(path)
    if not len(rows):
        raise ValueError(f"data file {path} has no rows; write it again or remove it from the list")
    return rows


def column_names(path: Path) -> list[str]:
    """Return the columns of one file; of a Parquet file only the footer is read.

    Raises:
        ValueError: see `read_rows`.
    """
    if path.suffix != ".parquet":
        return read_rows(path).columns
    _require_bytes(path)
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_unreadable_parquet(path, error)) from error


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
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {path}: invalid JSON at line {error.lineno} ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a key twice, an integer of thousands of digits, too many brackets
        raise ValueError(f"data file {path}: Python cannot read this JSON ({error})") from error


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Not str.splitlines, which also splits at characters such as U+2028 inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield json.loads(line, object_pairs_hook=without_repeated_keys)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(
                f"data file {path}: line {number} is not valid JSON ({reason}); a .json or .jsonl file must hold one "
                "object per line, or one array of objects"
            ) from error
