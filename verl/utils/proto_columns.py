"""Helpers of `verl.protocol.DataProto` for columns in plain dicts: compare, merge, check, index."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def object_array(values: Sequence[Any]) -> np.ndarray:
    """Return a 1-D object array with one cell per value, even if the values are lists of equal length."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def deep_equal(a: Any, b: Any) -> bool:
    """Compare two values; NaN equals NaN, and arrays and tensors are compared by dtype, shape and content."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor | np.ndarray) or isinstance(b, torch.Tensor | np.ndarray):
        return _arrays_equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(deep_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(deep_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (_is_nan(a) and _is_nan(b))


def _is_nan(value: Any) -> bool:
    return isinstance(value, float | np.floating) and bool(np.isnan(value))


def _arrays_equal(a: Any, b: Any) -> bool:
    same_kind = any(isinstance(a, kind) and isinstance(b, kind) for kind in (torch.Tensor, np.ndarray))
    if not same_kind or a.dtype != b.dtype or a.shape != b.shape:
        return False
    if isinstance(a, torch.Tensor):
        b = b.to(a.device)
    elif a.dtype == object:
        return all(deep_equal(x, y) for x, y in zip(a.flat, b.flat, strict=True))
    return bool(((a == b) | ((a != a) & (b != b))).all())


def merge_columns(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return one dict with the entries of both.

    Raises:
        ValueError: names a key whose values differ.
    """
    for key in ours.keys() & theirs.keys():
        if not deep_equal(ours[key], theirs[key]):
            raise ValueError(
                f"union: both sides have the {kind} {key!r} with different values; rename or pop it on one side first"
            )
    return {**ours, **theirs}


def require_same_columns(kind: str, first: Mapping[str, Any], other: Mapping[str, Any], part: int) -> None:
    """Check that part 0 and `part` have the same columns.

    Raises:
        ValueError: names the columns that only one of them has.
    """
    odd = sorted(first.keys() ^ other.keys())
    if odd:
        raise ValueError(f"concat: the {kind} columns {odd} are in only one of the parts 0 and {part}; pop or add them")


def require_same_lengths(lengths: Mapping[str, int]) -> None:
    """Check that all columns have the same length.

    Raises:
        ValueError: names the columns whose length is not the most frequent one.
    """
    counts = Counter(lengths.values())
    if len(counts) > 1:
        usual, _ = counts.most_common(1)[0]
        odd = {key: length for key, length in lengths.items() if length != usual}
        rest = [key for key, length in lengths.items() if length == usual]
        raise ValueError(
            f"columns of unequal length: {odd}, but {rest} have {usual} rows; every column needs one row per sample"
        )


def select_keys(source: Mapping[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    """Return the named entries in a new dict; None selects all."""
    return dict(source) if keys is None else {key: source[key] for key in keys}


def row_indices(index: Any, length: int) -> np.ndarray:
    """Return the row indices that an index selects from a table, int64 in [0, length).

    Args:
        index: a list, array or tensor of ints, negative ones included, or a bool mask.
        length: number of rows of the table.

    Raises:
        IndexError: a row is out of range, or a mask does not have the length of the table.
        TypeError: any other kind of index.
    """
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu().numpy()
    elif isinstance(index, list | tuple | range):
        index = np.asarray(index) if len(index) else np.empty(0, dtype=np.int64)
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "biu":
        raise TypeError(
            f"a DataProto index must be an int, a slice, a 1-D list or array of ints, or a mask; it is {index!r}"
        )
    if index.dtype.kind == "b":
        if len(index) != length:
            raise IndexError(f"the mask has {len(index)} entries, the DataProto has {length} rows")
        return np.flatnonzero(index)
    index = index.astype(np.int64)
    outside = index[(index < -length) | (index >= length)]
    if len(outside):
        raise IndexError(f"row {outside[0]} is out of range for a DataProto with {length} rows")
    return np.where(index < 0, index + length, index)


def cat_column(key: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate the rows of the parts of a column.

    Raises:
        ValueError: the parts differ in the shape of a row or in the dtype; the message names the column.
    """
    kinds = {(tuple(part.shape[1:]), str(part.dtype)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"concat: the parts of column {key!r} differ in (shape of a row, dtype): {sorted(kinds)}")
    return torch.cat(list(parts))


def concat_meta_info(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the meta_info of joined tables: "metrics" become one dict of lists, all other values must be equal.

    Raises:
        ValueError: names a key whose values differ.
    """
    merged: dict[str, Any] = {}
    metrics: dict[str, list[Any]] = {}
    for i, part in enumerate(parts):
        for key, value in part.items():
            if key == "metrics":
                for one in value if isinstance(value, list) else [value]:
                    for name, metric in one.items():
                        metrics.setdefault(name, []).extend(metric if isinstance(metric, list) else [metric])
            elif key in merged and not deep_equal(merged[key], value):
                raise ValueError(
                    f"concat: meta_info[{key!r}] is {merged[key]!r} in an earlier part and {value!r} in part {i}; "
                    "make them equal or pop the key"
                )
            else:
                merged.setdefault(key, value)
    if any("metrics" in part for part in parts):
        merged["metrics"] = metrics
    return merged


def unfold_column(key: str, column: Any, n_split: int) -> Any:
    """Cut a tensor or array [B, n_split * K, ...] along its second dimension: [B * n_split, K, ...].

    Raises:
        ValueError: it has no second dimension, or this is not divisible; the message names the column.
    """
    if n_split < 1 or column.ndim < 2 or column.shape[1] % n_split:
        raise ValueError(f"column {key!r} has the shape {tuple(column.shape)}: cannot cut dimension 1 into {n_split}")
    return column.reshape(column.shape[0] * n_split, column.shape[1] // n_split, *column.shape[2:])
