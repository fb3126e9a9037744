"""DataProto: the one thing that flows between the stages of a training step.

A `DataProto` is a table of B samples. Columns of numbers live in `batch` (a TensorDict of batch size [B]), columns of
anything else in `non_tensor_batch` (numpy arrays whose first dimension is B), and facts about the whole table in
`meta_info`.

What changes in place and what does not:

| in place, returns self | new table, columns are views | new table, columns are copies |
|---|---|---|
| `union`, `rename`, `reorder`, `to`; `pop` removes from self and returns the removed part | `select`, slices, `chunk`, `split` | a list, array or mask index, `concat`, `repeat`, `sample_level_repeat`, `select(deepcopy=True)` |

A new table gets its own `meta_info` dict, whose values are shared.
"""  # noqa: E501

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from verl.utils import proto_io
from verl.utils.proto_columns import (
    cat_column,
    concat_meta_info,
    merged,
    object_array,
    require_same_columns,
    require_same_lengths,
    row_numbers,
    subset,
)

__all__ = ["DataProto", "DataProtoItem", "pad_dataproto_to_divisor", "unpad_dataproto"]


@dataclass(eq=False)
class DataProtoItem:
    """One row of a DataProto: `batch` has batch size [], a cell of `non_tensor_batch` is the bare object."""

    batch: TensorDict | None = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DataProto:
    """A table of B samples; see the head of this file for which methods change it in place.

    Attributes:
        batch: dense tensors [B, ...] under string names, or None when there is no tensor column.
        non_tensor_batch: numpy arrays [B, ...], usually of dtype object.
        meta_info: values that belong to the whole table.

    Raises:
        ValueError: a column is no tensor or array, or its length differs from the others'; the column is named.
    """

    batch: TensorDict | None = None
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_consistency()

    # ---- making one -------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor] | None = None,
        non_tensors: Mapping[str, Any] | None = None,
        meta_info: Mapping[str, Any] | None = None,
    ) -> Self:
        """From columns. A non-tensor column that is a list or tuple becomes a 1-D object array.

        Raises:
            ValueError: a column has the wrong type or another length than the rest.
        """
        batch = None
        if tensors:
            for key, value in tensors.items():
                if not isinstance(value, torch.Tensor) or value.dim() == 0:
                    given = f"a {type(value).__name__}" if not isinstance(value, torch.Tensor) else "a 0-d tensor"
                    raise ValueError(f"tensors[{key!r}] is {given}: pass a tensor whose first dimension is the batch")
            require_same_lengths({key: len(value) for key, value in tensors.items()})
            batch = TensorDict(dict(tensors), batch_size=[len(next(iter(tensors.values())))])
        columns = {
            key: object_array(value) if isinstance(value, list | tuple) else value
            for key, value in (non_tensors or {}).items()
        }
        return cls(batch=batch, non_tensor_batch=columns, meta_info=dict(meta_info or {}))

    @classmethod
    def from_single_dict(cls, data: Mapping[str, Any], meta_info: Mapping[str, Any] | None = None) -> Self:
        """From one dict of columns: tensors go to `batch`, numpy arrays to `non_tensor_batch`.

        Raises:
            ValueError: a value is neither, or the lengths differ.
        """
        for key, value in data.items():
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise ValueError(f"data[{key!r}] is a {type(value).__name__}: pass a torch tensor or a numpy array")
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        return cls.from_dict(tensors, arrays, meta_info)

    @classmethod
    def from_tensordict(cls, data: TensorDict) -> Self:
        """The inverse of `to_tensordict`: stacks of non-tensors are columns, single non-tensors are `meta_info`.

        Raises:
            ValueError: the TensorDict has not exactly one batch dimension, or holds a nested TensorDict.
        """
        if len(data.batch_size) != 1:
            raise ValueError(f"batch_size={list(data.batch_size)}: a DataProto has exactly one batch dimension")
        tensors, columns, meta_info = {}, {}, {}
        for key, value in data.items():
            if isinstance(value, NonTensorStack):
                columns[key] = object_array(value.tolist())
            elif isinstance(value, NonTensorData):
                meta_info[key] = value.data
            else:
                tensors[key] = value
        batch = TensorDict(tensors, batch_size=data.batch_size) if tensors or not columns else None
        return cls(batch=batch, non_tensor_batch=columns, meta_info=meta_info)

    def to_tensordict(self) -> TensorDict:
        """One TensorDict with every column and every meta value; array columns come back as dtype object.

        Raises:
            ValueError: a name is used twice among tensors, non-tensors and meta_info.
        """
        names = [*self._tensors(), *self.non_tensor_batch, *self.meta_info]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"to_tensordict: {twice} name more than one column or meta value: rename one")
        result = TensorDict(self._tensors(), batch_size=[len(self)])
        for key, column in self.non_tensor_batch.items():
            result.set(key, NonTensorStack(*(NonTensorData(value) for value in column)))
        for key, value in self.meta_info.items():
            result.set_non_tensor(key, value)
        return result

    # ---- looking ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return next((len(column) for column in self.non_tensor_batch.values()), 0)

    def __iter__(self) -> Iterator[DataProtoItem]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> "DataProto | DataProtoItem":
        """An int gives a `DataProtoItem`; a slice (views), a list, an array or a bool mask (copies) a DataProto.

        Raises:
            IndexError: out of range, or a mask of another length than the table.
            TypeError: any other kind of index.
        """
        if isinstance(index, int | np.integer) and not isinstance(index, bool | np.bool_):
            row = int(index)
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} of a DataProto with {len(self)} rows")
            batch = None if self.batch is None else self.batch[row]
            return DataProtoItem(batch, {k: v[row] for k, v in self.non_tensor_batch.items()}, dict(self.meta_info))
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step > 0:
                return self._rows(index, index)
            index = list(range(start, stop, step))
        rows = row_numbers(index, len(self))
        return self._rows(torch.from_numpy(rows), rows)

    def _rows(self, tensor_index: Any, array_index: Any) -> Self:
        batch = None if self.batch is None else self.batch[tensor_index]
        columns = {key: column[array_index] for key, column in self.non_tensor_batch.items()}
        return type(self)(batch, columns, dict(self.meta_info))

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.batch is None else dict(self.batch.items())

    def check_consistency(self) -> None:
        """Check that every column is a dense tensor or an array and that all have the same length.

        Columns that were assigned directly (`data.non_tensor_batch["x"] = ...`) are seen here for the first time; the
        check also runs whenever the table is pickled or saved.

        Raises:
            ValueError: naming the column, its type or length, and what the others have.
        """
        lengths = {}
        if self.batch is not None:
            if not isinstance(self.batch, TensorDict):
                raise ValueError(f"batch is a {type(self.batch).__name__}: use DataProto.from_dict(tensors=...)")
            if len(self.batch.batch_size) != 1:
                raise ValueError(
                    f"batch.batch_size={list(self.batch.batch_size)}: exactly one batch dimension is needed"
                )
            for key, value in self.batch.items():
                if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_nested:
                    raise ValueError(f"batch[{key!r}] is a {type(value).__name__}: only dense tensors are supported")
                lengths[key] = len(value)
            lengths.setdefault("batch.batch_size", self.batch.batch_size[0])
        for key, column in self.non_tensor_batch.items():
            if not isinstance(column, np.ndarray) or column.ndim == 0:
                raise ValueError(
                    f"non_tensor_batch[{key!r}] is a {type(column).__name__}: use a numpy array with one row a sample "
                    "(dtype=object for anything that is not a number)"
                )
            lengths[key] = len(column)
        require_same_lengths(lengths)

    # ---- choosing columns -------------------------------------------------------------------------------------------

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> Self:
        """A new table with the named columns (None: all); the columns are shared with self unless `deepcopy`.

        Raises:
            KeyError: a name that is not there.
        """
        self._require(batch_keys, non_tensor_batch_keys, meta_info_keys)
        batch = self.batch
        if batch is not None:
            batch = batch.select(*batch_keys) if batch_keys is not None else batch.copy()
        columns = subset(self.non_tensor_batch, non_tensor_batch_keys)
        meta_info = subset(self.meta_info, meta_info_keys)
        if deepcopy:
            batch = None if batch is None else batch.clone()
            columns, meta_info = copy.deepcopy(columns), copy.deepcopy(meta_info)
        return type(self)(batch, columns, meta_info)

    def pop(
        self,
        batch_keys: Sequence[str] = (),
        non_tensor_batch_keys: Sequence[str] = (),
        meta_info_keys: Sequence[str] = (),
    ) -> Self:
        """Remove the named columns from self and return them as a table of their own.

        Raises:
            KeyError: a name that is not there; nothing is removed then.
        """
        self._require(batch_keys, non_tensor_batch_keys, meta_info_keys)
        popped = self.select(batch_keys, non_tensor_batch_keys, meta_info_keys)
        if not batch_keys and non_tensor_batch_keys:
            popped.batch = None
        for key in batch_keys:
            self.batch.pop(key)
        for key in non_tensor_batch_keys:
            del self.non_tensor_batch[key]
        for key in meta_info_keys:
            del self.meta_info[key]
        return popped

    def rename(self, old_keys: str | Sequence[str], new_keys: str | Sequence[str]) -> Self:
        """Rename columns, tensors or not, in place; returns self.

        Raises:
            KeyError: an old name is not a column.
            ValueError: unequal numbers of names, or a new name is already taken.
        """
        old = [old_keys] if isinstance(old_keys, str) else list(old_keys)
        new = [new_keys] if isinstance(new_keys, str) else list(new_keys)
        tensors, columns = self._tensors(), self.non_tensor_batch
        if len(old) != len(new):
            raise ValueError(f"rename: {len(old)} old names and {len(new)} new names")
        missing = [key for key in old if key not in tensors and key not in columns]
        if missing:
            raise KeyError(f"rename: no column {missing}; there are {sorted([*tensors, *columns])}")
        target = dict(zip(old, new, strict=True))
        after = [target.get(key, key) for key in (*tensors, *columns)]
        if len(set(after)) != len(after):
            raise ValueError(f"rename: {new} would give two columns one name; there are {sorted([*tensors, *columns])}")
        if self.batch is not None:
            renamed = {target.get(key, key): value for key, value in tensors.items()}
            self.batch = TensorDict(renamed, batch_size=self.batch.batch_size, device=self.batch.device)
        self.non_tensor_batch = {target.get(key, key): value for key, value in columns.items()}
        return self

    def union(self, other: "DataProto") -> Self:
        """Add the columns and meta values of `other` to self, in place; returns self.

        Raises:
            ValueError: the lengths differ, or a name on both sides has different values; self is unchanged then.
        """
        if not self._has_columns() or not other._has_columns() or len(self) == len(other):
            tensors = merged("tensor column", self._tensors(), other._tensors())
            columns = merged("non-tensor column", self.non_tensor_batch, other.non_tensor_batch)
            meta_info = merged("meta_info value", self.meta_info, other.meta_info)
        else:
            raise ValueError(f"union: {len(self)} rows here and {len(other)} rows there; both need the same rows")
        if self.batch is None and other.batch is not None:
            self.batch = other.batch.copy()
        elif self.batch is not None:
            self.batch.update(tensors)
        self.non_tensor_batch.update(columns)
        self.meta_info.update(meta_info)
        return self

    def _has_columns(self) -> bool:
        return self.batch is not None or bool(self.non_tensor_batch)

    def _require(self, *keys: Sequence[str] | None) -> None:
        kinds = ("batch", self._tensors()), ("non_tensor_batch", self.non_tensor_batch), ("meta_info", self.meta_info)
        for (kind, have), wanted in zip(kinds, keys, strict=True):
            missing = [key for key in wanted or () if key not in have]
            if missing:
                raise KeyError(f"{kind} has no {missing}; it has {sorted(have)}")

    # ---- cutting and joining rows -----------------------------------------------------------------------------------

    @classmethod
    def concat(cls, data: Sequence["DataProto"]) -> "DataProto":
        """Join tables with the same columns, one below the other.

        `meta_info` has to agree, except the key "metrics" (a dict, or a list of dicts): these are merged to one dict of
        lists, in the order of the tables, a value that is a list already being extended.

        Raises:
            ValueError: no table, other columns, a column of other width or dtype, or a meta value that differs.
        """
        if not data:
            raise ValueError("concat: got no DataProto; pass at least one")
        first = data[0]
        for i, part in enumerate(data):
            require_same_columns("tensor", first._tensors(), part._tensors(), i)
            require_same_columns("non-tensor", first.non_tensor_batch, part.non_tensor_batch, i)
        batch = None
        if all(part.batch is not None for part in data):
            tensors = {key: cat_column(key, [part.batch[key] for part in data]) for key in first._tensors()}
            batch = TensorDict(tensors, batch_size=[sum(len(part) for part in data)])
        columns = {key: np.concatenate([part.non_tensor_batch[key] for part in data]) for key in first.non_tensor_batch}
        return cls(batch, columns, concat_meta_info([part.meta_info for part in data]))

    def chunk(self, chunks: int) -> list[Self]:
        """Cut into `chunks` equally long tables, in order.

        Raises:
            ValueError: the rows do not divide; pad with `pad_dataproto_to_divisor` first.
        """
        if chunks < 1 or len(self) % chunks:
            raise ValueError(
                f"chunk: {len(self)} rows cannot be cut into {chunks} equal parts; "
                "pad with pad_dataproto_to_divisor(data, chunks), and unpad_dataproto the result"
            )
        size = len(self) // chunks
        return [self[i * size : (i + 1) * size] for i in range(chunks)]

    def split(self, split_size: int) -> list[Self]:
        """Cut into tables of `split_size` rows, in order; the last one may be shorter.

        Raises:
            ValueError: `split_size` is not positive.
        """
        if split_size < 1:
            raise ValueError(f"split_size={split_size}: has to be at least 1 row")
        return [self[i : i + split_size] for i in range(0, len(self), split_size)]

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> Self:
        """`repeat_times` copies of every row: a a b b if `interleave`, else a b a b.

        Raises:
            ValueError: `repeat_times` is negative.
        """
        if repeat_times < 0:
            raise ValueError(f"repeat_times={repeat_times}: cannot be negative")
        rows = np.arange(len(self))
        return self[np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times)]

    def sample_level_repeat(self, repeat_times: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """`repeat_times[i]` copies of row i, next to each other; 0 drops the row.

        Raises:
            ValueError: not one non-negative count a row.
        """
        counts = np.asarray(repeat_times)
        if counts.shape != (len(self),) or (len(counts) and (counts.dtype.kind not in "iu" or counts.min() < 0)):
            raise ValueError(f"repeat_times={repeat_times}: needs one non-negative count for each of {len(self)} rows")
        return self[np.repeat(np.arange(len(self)), counts.astype(np.int64))]

    def reorder(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """Put row `indices[i]` at place i, in place; returns self.

        Raises:
            ValueError: `indices` is not a permutation of the rows.
        """
        rows = row_numbers(indices, len(self))
        if not np.array_equal(np.sort(rows), np.arange(len(self))):
            raise ValueError(
                f"reorder: the indices are not a permutation of {len(self)} rows; use data[indices] to pick rows"
            )
        ordered = self._rows(torch.from_numpy(rows), rows)
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch
        return self

    # ---- moving -----------------------------------------------------------------------------------------------------

    def to(self, device: str | torch.device) -> Self:
        """Move the tensors to `device`, in place; returns self."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Tensors as bare arrays: pickle protocol 5 (and so Ray) moves them without a copy; a view sends its rows only.

        Gradients and devices stay behind: tensors arrive on the CPU.
        """
        self.check_consistency()
        return {
            "rows": None if self.batch is None else len(self),
            "tensors": {key: proto_io.pack_tensor(value) for key, value in self._tensors().items()},
            "non_tensor_batch": self.non_tensor_batch,
            "meta_info": self.meta_info,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.batch = None
        if state["rows"] is not None:
            tensors = {key: proto_io.unpack_tensor(*packed) for key, packed in state["tensors"].items()}
            self.batch = TensorDict(tensors, batch_size=[state["rows"]])
        self.non_tensor_batch = {
            key: column if column.flags.writeable else column.copy()
            for key, column in state["non_tensor_batch"].items()
        }
        self.meta_info = state["meta_info"]

    def save_to_disk(self, filepath: str | Path) -> None:
        """Write one safetensors file (no pickle in it), whole or not at all; missing directories are made.

        Raises:
            ValueError: an object column or meta value that JSON cannot give back as it is (tuple, numpy scalar, ...).
            OSError: the disk is full, ...; an older file of that name is untouched.
        """
        self.check_consistency()
        rows = None if self.batch is None else len(self)
        proto_io.save(Path(filepath), rows, self._tensors(), self.non_tensor_batch, self.meta_info)

    @classmethod
    def load_from_disk(cls, filepath: str | Path) -> Self:
        """Read what `save_to_disk` wrote; tensors come back on the CPU. No code from the file is run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not whole, or not written by `save_to_disk`.
        """
        rows, tensors, columns, meta_info = proto_io.load(Path(filepath))
        batch = None if rows is None else TensorDict(tensors, batch_size=[rows])
        return cls(batch, columns, meta_info)


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Append rows until the length divides by `size_divisor`, cycling through `data` from its head.

    Returns:
        The padded table (`data` itself if nothing is missing) and the number of appended rows. An empty table is
        returned as it is.

    Raises:
        ValueError: `size_divisor` is not positive.
    """
    if size_divisor < 1:
        raise ValueError(f"size_divisor={size_divisor}: has to be at least 1")
    pad_size = -len(data) % size_divisor
    if pad_size == 0:
        return data, 0
    return data[np.arange(len(data) + pad_size) % len(data)], pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Drop the last `pad_size` rows (a view), as appended by `pad_dataproto_to_divisor`.

    Raises:
        ValueError: `pad_size` is negative or more than there are rows.
    """
    if not 0 <= pad_size <= len(data):
        raise ValueError(f"pad_size={pad_size}: has to be between 0 and the {len(data)} rows of the table")
    return data[: len(data) - pad_size] if pad_size else data
