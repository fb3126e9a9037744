"""The base of `verl.protocol.DataProto`: construction, consistency, access to rows, pickle and disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast, overload

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from verl.protocol import io as proto_io
from verl.utils.proto_columns import object_array, require_same_lengths, row_indices

AUTO_PADDING_KEY = "_verl_auto_padding"
"""Key of `meta_info`: `chunk` may cut this table into parts of unequal length."""


@dataclass(eq=False)
class DataProtoItem:
    """One row of a DataProto: `batch` has batch size [], `non_tensor_batch` holds one object per column."""

    batch: TensorDict | Any = None
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Table:
    """Columns of B rows, and the values of the whole table.

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
        auto_padding: bool = False,
    ) -> Self:
        """Build a table from columns. A non-tensor column that is a list or tuple becomes a 1-D object array.

        With `auto_padding`, `chunk` also cuts the table if the number of rows is not divisible.

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
        marked = {AUTO_PADDING_KEY: True} if auto_padding else {}
        return cls(batch=batch, non_tensor_batch=columns, meta_info={**(meta_info or {}), **marked})

    @classmethod
    def from_single_dict(
        cls, data: Mapping[str, Any], meta_info: Mapping[str, Any] | None = None, auto_padding: bool = False
    ) -> Self:
        """Build a table from one dict of columns: tensors go to `batch`, numpy arrays to `non_tensor_batch`.

        With `auto_padding`, `chunk` also cuts the table if the number of rows is not divisible.

        Raises:
            ValueError: a value is neither a tensor nor an array, or the lengths differ.
        """
        for key, value in data.items():
            if not isinstance(value, torch.Tensor | np.ndarray):
                raise ValueError(f"data[{key!r}] is a {type(value).__name__}: pass a torch tensor or a numpy array")
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        return cls.from_dict(tensors, arrays, meta_info, auto_padding)

    @classmethod
    def from_tensordict(cls, tensor_dict: TensorDict, meta_info: Mapping[str, Any] | None = None) -> Self:
        """Build a table from the result of `to_tensordict`.

        A stack of non-tensors becomes a column, a single non-tensor becomes a value of `meta_info`.

        Args:
            tensor_dict: has exactly one batch dimension.
            meta_info: further values of the whole table.

        Raises:
            ValueError: the TensorDict does not have exactly one batch dimension, or it holds a nested TensorDict, or a
                name is both in it and in `meta_info`.
        """
        if len(tensor_dict.batch_size) != 1:
            raise ValueError(f"batch_size={list(tensor_dict.batch_size)}: a DataProto has exactly one batch dimension")
        tensors: dict[str, Any] = {}
        columns: dict[str, np.ndarray] = {}
        values: dict[str, Any] = {}
        for key, value in tensor_dict.items():
            if isinstance(value, NonTensorStack):
                columns[key] = object_array(value.tolist())
            elif isinstance(value, NonTensorData):
                values[key] = value.data
            else:
                tensors[key] = value
        if twice := sorted(values.keys() & (meta_info or {}).keys()):
            raise ValueError(f"from_tensordict: duplicate name {twice} in tensor_dict and meta_info; rename one")
        batch = TensorDict(tensors, batch_size=tensor_dict.batch_size) if tensors or not columns else None
        return cls(batch=batch, non_tensor_batch=columns, meta_info={**values, **(meta_info or {})})

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
