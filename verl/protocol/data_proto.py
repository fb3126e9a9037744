"""DataProto: the table of samples that the stages of a training step exchange.

A `DataProto` holds B samples. Numeric columns are in `batch` (a TensorDict of batch size [B]), all other columns in
`non_tensor_batch` (numpy arrays whose first dimension is B), and values of the whole table in `meta_info`.

Methods that modify the table, and methods that return a new one:

| in place, returns self | new table, columns are views | new table, columns are copies |
|---|---|---|
| `union`, `rename`, `reorder`, `to`; `pop` removes from self and returns the removed part | `select`, slices, `chunk`, `split` | a list, array or mask index, `concat`, `repeat`, `sample_level_repeat`, `select(deepcopy=True)` |

A new table has its own `meta_info` dict; the values in it are shared.
"""  # noqa: E501

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast, overload

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from verl.protocol import io as proto_io
from verl.utils.proto_columns import (
    cat_column,
    concat_meta_info,
    merge_columns,
    object_array,
    require_same_columns,
    require_same_lengths,
    row_indices,
    select_keys,
)

__all__ = ["DataProto", "DataProtoItem", "pad_dataproto_to_divisor", "unpad_dataproto"]


@dataclass(eq=False)
class DataProtoItem:
    """One row of a DataProto: `batch` has batch size [], `non_tensor_batch` holds one object per column."""

    batch: TensorDict | Any = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DataProto:
    """A table of B samples; the docstring of this file lists the methods that modify it in place.

    Attributes:
        batch: dense tensors [B, ...] by name, or None without a tensor column.
        non_tensor_batch: numpy arrays [B, ...], usually of dtype object.
        meta_info: values of the whole table.

    Raises:
        ValueError: a column is not a tensor or array, or its length differs from the others; the message names it.
    """

    # None without a tensor column. `Any` instead of None, because code that reads a tensor column knows that it exists.
    batch: TensorDict | Any = None
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check_consistency()

    # ---- construction -----------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor] | None = None,
        non_tensors: Mapping[str, Any] | None = None,
        meta_info: Mapping[str, Any] | None = None,
    ) -> Self:
        """Build a table from columns. A non-tensor column that is a list or tuple becomes a 1-D object array.

        Raises:
            ValueError: a column has the wrong type, or its length differs from the others.
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
        """Build a table from one dict of columns: tensors go to `batch`, numpy arrays to `non_tensor_batch`.

        Raises:
            ValueError: a value is neither a tensor nor an array, or the lengths differ.
        """
        for key, value in data.items():
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise ValueError(f"data[{key!r}] is a {type(value).__name__}: pass a torch tensor or a numpy array")
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        return cls.from_dict(tensors, arrays, meta_info)

    @classmethod
    def from_tensordict(cls, data: TensorDict) -> Self:
        """Build a table from the result of `to_tensordict`.

        A stack of non-tensors becomes a column, a single non-tensor becomes a value of `meta_info`.

        Raises:
            ValueError: the TensorDict does not have exactly one batch dimension, or it holds a nested TensorDict.
        """
        if len(data.batch_size) != 1:
            raise ValueError(f"batch_size={list(data.batch_size)}: a DataProto has exactly one batch dimension")
        tensors: dict[str, Any] = {}
        columns: dict[str, np.ndarray] = {}
        meta_info: dict[str, Any] = {}
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
        """Return one TensorDict with all columns and meta values; array columns are restored with dtype object.

        Raises:
            ValueError: duplicate name among tensors, non-tensors and meta_info.
        """
        names = [*self._tensors(), *self.non_tensor_batch, *self.meta_info]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"to_tensordict: duplicate name {twice} among columns and meta values; rename one")
        result = TensorDict(self._tensors(), batch_size=[len(self)])
        for key, column in self.non_tensor_batch.items():
            result.set(key, NonTensorStack(*(NonTensorData(value) for value in column)))
        for key, value in self.meta_info.items():
            result.set_non_tensor(key, value)
        return result

    # ---- access -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return next((len(column) for column in self.non_tensor_batch.values()), 0)

    def __iter__(self) -> Iterator[DataProtoItem]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int | np.integer) -> DataProtoItem: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | torch.Tensor) -> Self: ...

    def __getitem__(self, index: Any) -> Self | DataProtoItem:
        """Return a `DataProtoItem` for an int, and a DataProto for all other kinds of index.

        The columns are views for a slice, and copies for a list, an array or a bool mask.

        Raises:
            IndexError: a row is out of range, or a mask does not have the length of the table.
            TypeError: any other kind of index.
        """
        if isinstance(index, int | np.integer) and not isinstance(index, bool | np.bool_):
            row = int(index)
            if not -len(self) <= row < len(self):
                raise IndexError(f"row {row} is out of range for a DataProto with {len(self)} rows")
            batch = None if self.batch is None else self.batch[row]
            return DataProtoItem(batch, {k: v[row] for k, v in self.non_tensor_batch.items()}, dict(self.meta_info))
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step > 0:
                return self._rows(index, index)
            index = list(range(start, stop, step))
        rows = row_indices(index, len(self))
        return self._rows(torch.from_numpy(rows), rows)

    def _rows(self, tensor_index: Any, array_index: Any) -> Self:
        batch = None if self.batch is None else self.batch[tensor_index]
        columns = {key: column[array_index] for key, column in self.non_tensor_batch.items()}
        return type(self)(batch, columns, dict(self.meta_info))

    def _tensors(self) -> dict[str, torch.Tensor]:
        # `check_consistency` rejects nested TensorDicts.
        return {} if self.batch is None else cast(dict[str, torch.Tensor], dict(self.batch.items()))

    def check_consistency(self) -> None:
        """Check that every column is a dense tensor or an array, and that all have the same length.

        Pickling and saving run this check too. It finds columns that were assigned directly
        (`data.non_tensor_batch["x"] = ...`).

        Raises:
            ValueError: names the column, its type or length, and the length of the others.
        """
        lengths = {}
        if self.batch is not None:
            if not isinstance(self.batch, TensorDict):
                raise ValueError(f"batch is a {type(self.batch).__name__}: use DataProto.from_dict(tensors=...)")
            if len(self.batch.batch_size) != 1:
                raise ValueError(f"batch.batch_size={list(self.batch.batch_size)}: must have exactly one dimension")
            for key, value in self.batch.items():
                if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_nested:
                    raise ValueError(f"batch[{key!r}] is a {type(value).__name__}: only dense tensors are supported")
                lengths[key] = len(value)
            lengths.setdefault("batch.batch_size", self.batch.batch_size[0])
        for key, column in self.non_tensor_batch.items():
            if not isinstance(column, np.ndarray) or column.ndim == 0:
                raise ValueError(
                    f"non_tensor_batch[{key!r}] is a {type(column).__name__}: use a numpy array, one row per sample "
                    "(dtype=object for values that are not numbers)"
                )
            lengths[key] = len(column)
        require_same_lengths(lengths)

    # ---- columns ----------------------------------------------------------------------------------------------------

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> Self:
        """Return a new table with the named columns (None: all); self shares the columns unless `deepcopy`.

        Raises:
            KeyError: unknown name.
        """
        self._require(batch_keys, non_tensor_batch_keys, meta_info_keys)
        batch = self.batch
        if batch is not None:
            batch = batch.select(*batch_keys) if batch_keys is not None else batch.copy()
        columns = select_keys(self.non_tensor_batch, non_tensor_batch_keys)
        meta_info = select_keys(self.meta_info, meta_info_keys)
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
        """Remove the named columns from self and return them as a new table.

        Raises:
            KeyError: unknown name; nothing is removed.
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
        """Rename columns of either kind, in place; returns self.

        Raises:
            KeyError: an old name is not a column.
            ValueError: the numbers of names differ, or duplicate name.
        """
        old = [old_keys] if isinstance(old_keys, str) else list(old_keys)
        new = [new_keys] if isinstance(new_keys, str) else list(new_keys)
        tensors, columns = self._tensors(), self.non_tensor_batch
        if len(old) != len(new):
            raise ValueError(f"rename: {len(old)} old names and {len(new)} new names; pass one new name per old name")
        missing = [key for key in old if key not in tensors and key not in columns]
        if missing:
            raise KeyError(f"rename: unknown column {missing}; the columns are {sorted([*tensors, *columns])}")
        target = dict(zip(old, new, strict=True))
        after = [target.get(key, key) for key in (*tensors, *columns)]
        if len(set(after)) != len(after):
            raise ValueError(f"rename: duplicate name in {new}; the columns are {sorted([*tensors, *columns])}")
        if self.batch is not None:
            renamed = {target.get(key, key): value for key, value in tensors.items()}
            self.batch = TensorDict(renamed, batch_size=self.batch.batch_size, device=self.batch.device)
        self.non_tensor_batch = {target.get(key, key): value for key, value in columns.items()}
        return self

    def union(self, other: "DataProto") -> Self:
        """Add the columns and meta values of `other` to self, in place; returns self.

        Raises:
            ValueError: the lengths differ, or both sides have a name with different values; self is unchanged.
        """
        if not self._has_columns() or not other._has_columns() or len(self) == len(other):
            tensors = merge_columns("tensor column", self._tensors(), other._tensors())
            columns = merge_columns("non-tensor column", self.non_tensor_batch, other.non_tensor_batch)
            meta_info = merge_columns("meta_info value", self.meta_info, other.meta_info)
        else:
            raise ValueError(f"union: {len(self)} rows and {len(other)} rows; both tables must have the same rows")
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
        kinds: tuple[tuple[str, Mapping[str, Any]], ...] = (
            ("batch", self._tensors()),
            ("non_tensor_batch", self.non_tensor_batch),
            ("meta_info", self.meta_info),
        )
        for (kind, have), wanted in zip(kinds, keys, strict=True):
            missing = [key for key in wanted or () if key not in have]
            if missing:
                raise KeyError(f"unknown name {missing}: {kind} has {sorted(have)}")

    # ---- rows -------------------------------------------------------------------------------------------------------

    @classmethod
    def concat(cls, data: Sequence["DataProto"]) -> "DataProto":
        """Join the rows of tables with the same columns, in order.

        The values of `meta_info` must be equal, except the key "metrics" (a dict, or a list of dicts). These are merged
        into one dict of lists, in the order of the tables; values that are lists are concatenated.

        Raises:
            ValueError: no table is given, or columns, row shapes, dtypes or meta values differ.
        """
        if not data:
            raise ValueError("concat: no DataProto is given; pass at least one")
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
        """Cut into `chunks` tables of equal length, in order.

        Raises:
            ValueError: the number of rows is not divisible by `chunks`; pad with `pad_dataproto_to_divisor` first.
        """
        if chunks < 1 or len(self) % chunks:
            raise ValueError(
                f"chunk: {len(self)} rows cannot be cut into {chunks} equal parts; "
                "call pad_dataproto_to_divisor(data, chunks) before and unpad_dataproto after"
            )
        size = len(self) // chunks
        return [self[i * size : (i + 1) * size] for i in range(chunks)]

    def split(self, split_size: int) -> list[Self]:
        """Cut into tables of `split_size` rows, in order; the last one may be shorter.

        Raises:
            ValueError: `split_size` is not positive.
        """
        if split_size < 1:
            raise ValueError(f"split_size={split_size}: must be at least 1 row")
        return [self[i : i + split_size] for i in range(0, len(self), split_size)]

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> Self:
        """Return `repeat_times` copies of every row: a a b b if `interleave`, else a b a b.

        Raises:
            ValueError: `repeat_times` is negative.
        """
        if repeat_times < 0:
            raise ValueError(f"repeat_times={repeat_times}: must not be negative")
        rows = np.arange(len(self))
        return self[np.repeat(rows, repeat_times) if interleave else np.tile(rows, repeat_times)]

    def sample_level_repeat(self, repeat_times: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """Return `repeat_times[i]` adjacent copies of row i; 0 drops the row.

        Raises:
            ValueError: `repeat_times` is not one non-negative count per row.
        """
        counts = np.asarray(repeat_times)
        if counts.shape != (len(self),) or (len(counts) and (counts.dtype.kind not in "iu" or counts.min() < 0)):
            raise ValueError(
                f"repeat_times={repeat_times}: must be one non-negative count for each of {len(self)} rows"
            )
        return self[np.repeat(np.arange(len(self)), counts.astype(np.int64))]

    def reorder(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """Move row `indices[i]` to row i, in place; returns self.

        Raises:
            ValueError: `indices` is not a permutation of the rows.
        """
        rows = row_indices(indices, len(self))
        if not np.array_equal(np.sort(rows), np.arange(len(self))):
            raise ValueError(
                f"reorder: the indices must be a permutation of {len(self)} rows; use data[indices] to select rows"
            )
        ordered = self._rows(torch.from_numpy(rows), rows)
        self.batch, self.non_tensor_batch = ordered.batch, ordered.non_tensor_batch
        return self

    # ---- devices, pickle, disk --------------------------------------------------------------------------------------

    def to(self, device: str | torch.device) -> Self:
        """Move the tensors to `device`, in place; returns self."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle, with tensors as numpy arrays.

        Pickle protocol 5, and therefore Ray, transfers them without a copy. A view transfers only its own rows.
        Gradients and devices are not kept: the restored tensors are on the CPU.
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
        """Write one safetensors file atomically, without pickle; missing directories are created.

        Raises:
            ValueError: JSON cannot restore an object column or meta value exactly (tuple, numpy scalar, ...).
            OSError: for example, the disk is full; an existing file of that name is unchanged.
        """
        self.check_consistency()
        rows = None if self.batch is None else len(self)
        proto_io.save(Path(filepath), rows, self._tensors(), self.non_tensor_batch, self.meta_info)

    @classmethod
    def load_from_disk(cls, filepath: str | Path) -> Self:
        """Read a file of `save_to_disk`; the tensors are on the CPU. No code from the file is run.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is damaged, or `save_to_disk` did not write it.
        """
        rows, tensors, columns, meta_info = proto_io.load(Path(filepath))
        batch = None if rows is None else TensorDict(tensors, batch_size=[rows])
        return cls(batch, columns, meta_info)


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Append rows until the length is divisible by `size_divisor`. The added rows repeat `data` from its first row.

    Returns:
        the padded table (`data` itself if no row is added), and the number of added rows. An empty table is returned
        unchanged.

    Raises:
        ValueError: `size_divisor` is not positive.
    """
    if size_divisor < 1:
        raise ValueError(f"size_divisor={size_divisor}: must be at least 1")
    pad_size = -len(data) % size_divisor
    if pad_size == 0:
        return data, 0
    return data[np.arange(len(data) + pad_size) % len(data)], pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Return `data` without its last `pad_size` rows, which `pad_dataproto_to_divisor` added; the columns are views.

    Raises:
        ValueError: `pad_size` is negative, or larger than the number of rows.
    """
    if not 0 <= pad_size <= len(data):
        raise ValueError(f"pad_size={pad_size}: must be between 0 and {len(data)}, the number of rows")
    return data[: len(data) - pad_size] if pad_size else data
