"""Columns of `verl.protocol.DataProto` as plain dicts: comparing, merging, checking."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


def object_array(values: Sequence[Any]) -> np.ndarray:
    """A 1-D object array with one cell a value, also when the values are equally long lists."""
    array = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        array[i] = value
    return array


def deep_equal(a: Any, b: Any) -> bool:
    """Equality in which NaN equals NaN, and arrays and tensors compare by dtype, shape and content."""
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


def merged(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Both dicts in one; a ValueError names a key whose values differ."""
    for key in ours.keys() & theirs.keys():
        if not deep_equal(ours[key], theirs[key]):
            raise ValueError(
                f"union: both sides have the {kind} {key!r} with different values; rename or pop it on one side first"
            )
    return {**ours, **theirs}


def require_same_columns(kind: str, first: Mapping[str, Any], other: Mapping[str, Any], part: int) -> None:
    """Raise a ValueError naming the columns that only one of the parts 0 and `part` has."""
    odd = sorted(first.keys() ^ other.keys())
    if odd:
        raise ValueError(f"concat: the {kind} columns {odd} are in only one of the parts 0 and {part}; pop or add them")


def require_same_lengths(lengths: Mapping[str, int]) -> None:
    """Raise a ValueError naming the columns whose length is not that of most."""
    counts = Counter(lengths.values())
    if len(counts) > 1:
        usual, _ = counts.most_common(1)[0]
        odd = {key: length for key, length in lengths.items() if length != usual}
        rest = [key for key, length in lengths.items() if length == usual]
        raise ValueError(
            f"columns of unequal length: {odd}, but {rest} have {usual} rows; every column needs one row a sample"
        )


def subset(source: Mapping[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    """The named entries, or all of them for None, in a new dict."""
    return dict(source) if keys is None else {key: source[key] for key in keys}


def row_numbers(index: Any, length: int) -> np.ndarray:
    """Rows of a table with `length` rows as int64 in [0, length), from a list, array or tensor of ints or a bool mask.

    Raises:
        IndexError: a row outside, or a mask of another length.
        TypeError: anything else.
    """
    if isinstance(index, torch.Tensor):
        index = index.detach().cpu().numpy()
    elif isinstance(index, list | tuple | range):
        index = np.asarray(index) if len(index) else np.empty(0, dtype=np.int64)
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "biu":
        raise TypeError(f"a DataProto takes an int, slice, 1-D list or array of ints, or a mask; got {index!r}")
    if index.dtype.kind == "b":
        if len(index) != length:
            raise IndexError(f"a mask of {len(index)} entries for a DataProto with {length} rows")
        return np.flatnonzero(index)
    index = index.astype(np.int64)
    outside = index[(index < -length) | (index >= length)]
    if len(outside):
        raise IndexError(f"row {outside[0]} of a DataProto with {length} rows")
    return np.where(index < 0, index + length, index)


def cat_column(key: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` along the rows; a ValueError names a column whose parts differ in width or dtype."""
    kinds = {(tuple(part.shape[1:]), str(part.dtype)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"concat: the parts of column {key!r} differ in (shape of a row, dtype): {sorted(kinds)}")
    return torch.cat(list(parts))


def concat_meta_info(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One meta_info for joined tables: "metrics" become one dict of lists, any other key has to agree (ValueError)."""
    merged: dict[str, Any] = {}
    metrics: dict[str, list] = {}
    for i, part in enumerate(parts):
        for key, value in part.items():
            if key == "metrics":
                for one in value if isinstance(value, list) else [value]:
                    for name, metric in one.items():
                        metrics.setdefault(name, []).extend(metric if isinstance(metric, list) else [metric])
            elif key in merged and not deep_equal(merged[key], value):
                raise ValueError(
                    f"concat: meta_info[{key!r}] is {merged[key]!r} in an earlier part and {value!r} in part {i}; "
                    "make them agree or pop the key"
                )
            else:
                merged.setdefault(key, value)
    if any("metrics" in part for part in parts):
        merged["metrics"] = metrics
    return merged
