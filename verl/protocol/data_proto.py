"""DataProto: the table of samples that the stages of a training step exchange.

A `DataProto` holds B samples. Numeric columns are in `batch` (a TensorDict of batch size [B]), all other columns in
`non_tensor_batch` (numpy arrays whose first dimension is B), and values of the whole table in `meta_info`.

Methods that modify the table, and methods that return a new one:

| in place, returns self | new table, columns are views | new table, columns are copies |
|---|---|---|
| `union`, `rename`, `reorder`, `to`; `padding`; `pop` removes from self and returns the removed part | `select`, slices, `slice`, `chunk`, `split` | a list, array or mask index, `select_idxs`, `concat`, `repeat`, `sample_level_repeat`, `unfold_column_chunks`, `make_iterator`, `select(deepcopy=True)` |

A new table has its own `meta_info` dict; the values in it are shared.
"""  # noqa: E501

import copy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader

from verl.protocol.table import AUTO_PADDING_KEY, DataProtoItem, Table
from verl.utils.proto_columns import (
    cat_column,
    concat_meta_info,
    merge_columns,
    require_same_columns,
    row_indices,
    select_keys,
    unfold_column,
)

__all__ = ["DataProto", "DataProtoConfig", "DataProtoItem", "pad_dataproto_to_divisor", "unpad_dataproto"]


class DataProtoConfig:
    """Settings of all tables of this process.

    Attributes:
        auto_padding: `chunk` also cuts tables whose number of rows is not divisible, like tables with the meta value
            `auto_padding_key`.
    """

    auto_padding: ClassVar[bool] = False
    auto_padding_key: ClassVar[str] = AUTO_PADDING_KEY


@dataclass(eq=False)
class DataProto(Table):
    """A table of B samples; the docstring of this file lists the methods that modify it in place.

    A method that modifies the table checks its arguments first: after an error, the table is unchanged.

    Attributes:
        batch: dense tensors [B, ...] by name, or None without a tensor column.
        non_tensor_batch: numpy arrays [B, ...], usually of dtype object.
        meta_info: values of the whole table.
    """

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
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
    ) -> Self:
        """Remove the named columns from self and return them as a new table; None removes nothing of that kind.

        Raises:
            KeyError: unknown name; nothing is removed.
        """
        batch_keys, non_tensor_batch_keys, meta_info_keys = (
            () if keys is None else keys for keys in (batch_keys, non_tensor_batch_keys, meta_info_keys)
        )
        popped = self.select(batch_keys, non_tensor_batch_keys, meta_info_keys)
        if not batch_keys and non_tensor_batch_keys:
            popped.batch = None
        # A name that is given twice is removed once.
        for key in dict.fromkeys(batch_keys):
            self.batch.pop(key)
        for key in dict.fromkeys(non_tensor_batch_keys):
            del self.non_tensor_batch[key]
        for key in dict.fromkeys(meta_info_keys):
            del self.meta_info[key]
        return popped

    def rename(self, old_keys: str | Sequence[str], new_keys: str | Sequence[str]) -> Self:
        """Rename columns of either kind, in place; returns self.

        Raises:
            KeyError: an old name is not a column.
            ValueError: the numbers of names differ, or duplicate name; nothing is renamed.
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
        if len(target) != len(old):
            raise ValueError(f"rename: duplicate name in {old}; give each column one new name")
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
            if isinstance(wanted, str):
                raise TypeError(f"{kind}: {wanted!r} is one str; pass a list of names")
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

    def is_padding_enabled(self) -> bool:
        """Return True if `chunk` also cuts this table when the number of rows is not divisible."""
        return bool(self.meta_info.get(AUTO_PADDING_KEY) or DataProtoConfig.auto_padding)

    def chunk(self, chunks: int) -> list[Self]:
        """Cut into `chunks` tables of equal length, in order.

        With auto padding, the parts have ceil(B / chunks) rows as long as there are rows; the last ones may be shorter
        or empty.

        Raises:
            ValueError: the number of rows is not divisible by `chunks` and auto padding is off; pad with
                `pad_dataproto_to_divisor` first.
        """
        if chunks < 1 or (len(self) % chunks and not self.is_padding_enabled()):
            raise ValueError(
                f"chunk: {len(self)} rows cannot be cut into {chunks} equal parts; "
                "call pad_dataproto_to_divisor(data, chunks) before and unpad_dataproto after"
            )
        size = -(-len(self) // chunks)
        return [self[i * size : (i + 1) * size] for i in range(chunks)]

    def split(self, split_size: int) -> list[Self]:
        """Cut into tables of `split_size` rows, in order; the last one may be shorter.

        Raises:
            ValueError: `split_size` is not positive.
        """
        if split_size < 1:
            raise ValueError(f"split_size={split_size}: must be at least 1 row")
        return [self[i : i + split_size] for i in range(0, len(self), split_size)]

    def slice(self, start: int | None = None, end: int | None = None, step: int | None = None) -> Self:
        """Return the rows `start:end:step` as a new table, like `self[start:end:step]`."""
        return self[start:end:step]

    def select_idxs(self, idxs: Sequence[int] | np.ndarray | torch.Tensor) -> Self:
        """Return the rows of a list or array of row numbers, or of a mask, as a new table; see `self[idxs]`."""
        return self[idxs]

    def padding(self, padding_size: int, padding_candidate: str = "last") -> None:
        """Append `padding_size` copies of one row, in place.

        Args:
            padding_size: number of rows to append.
            padding_candidate: "first" or "last", the row to copy; "" means "last".

        Raises:
            ValueError: `padding_size` is negative, another candidate, or the table is empty.
        """
        if padding_size < 0 or padding_candidate not in ("first", "last", ""):
            raise ValueError(
                f"padding: padding_size={padding_size}, padding_candidate={padding_candidate!r}: use a size of at "
                "least 0, and first or last"
            )
        if padding_size == 0:
            return
        if not len(self):
            raise ValueError("padding: the table is empty, so there is no row to copy")
        copied = 0 if padding_candidate == "first" else len(self) - 1
        padded = self[[*range(len(self)), *[copied] * padding_size]]
        self.batch, self.non_tensor_batch = padded.batch, padded.non_tensor_batch

    def make_iterator(
        self,
        mini_batch_size: int,
        epochs: int,
        seed: int | None = None,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Self]:
        """Return an iterator over mini-batches of `mini_batch_size` rows, `epochs` times over the table.

        Args:
            mini_batch_size: rows per mini-batch; must divide the number of rows.
            epochs: passes over the table.
            seed: seed of the order, for `dataloader_kwargs={"shuffle": True}`; None: torch's global generator.
            dataloader_kwargs: further keywords of torch's `DataLoader`.

        Raises:
            ValueError: `mini_batch_size` does not divide the number of rows.
        """
        if mini_batch_size < 1 or len(self) % mini_batch_size:
            raise ValueError(f"make_iterator: mini_batch_size={mini_batch_size} must divide the {len(self)} rows")
        loader: DataLoader[Any] = DataLoader(
            range(len(self)),  # type: ignore[arg-type]  # a sequence of row numbers is a map-style dataset
            batch_size=mini_batch_size,
            collate_fn=self.select_idxs,
            generator=None if seed is None else torch.Generator().manual_seed(seed),
            **(dataloader_kwargs or {}),
        )
        return (batch for _ in range(epochs) for batch in loader)

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

    def unfold_column_chunks(self, n_split: int, split_keys: Sequence[str] | None = None) -> Self:
        """Return a table of B * n_split rows: the named columns are cut along their second dimension, others repeated.

        Args:
            n_split: number of parts of a row; must divide the second dimension of each named column.
            split_keys: names of the columns to cut, [B, n_split * K, ...] -> [B * n_split, K, ...]; None: none.

        Raises:
            KeyError: unknown column.
            ValueError: a column cannot be cut into `n_split` parts.
        """
        wanted = list(split_keys or ())
        if missing := [key for key in wanted if key not in self._tensors() and key not in self.non_tensor_batch]:
            raise KeyError(f"unfold_column_chunks: unknown column {missing}")
        unfolded = self.repeat(n_split)
        for columns, target in ((self._tensors(), unfolded.batch), (self.non_tensor_batch, unfolded.non_tensor_batch)):
            for key in wanted:
                if key in columns:
                    target[key] = unfold_column(key, columns[key], n_split)
        return unfolded

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

    # ---- sizes ------------------------------------------------------------------------------------------------------

    def print_size(self, prefix: str = "") -> None:
        """Print the bytes of the tensors and of the arrays in GiB; objects in an array count as pointers."""
        tensors = sum(value.element_size() * value.numel() for value in self._tensors().values())
        arrays = sum(column.nbytes for column in self.non_tensor_batch.values())
        text = f"size of batch: {tensors / 2**30:.6f} GiB, size of non_tensor_batch: {arrays / 2**30:.6f} GiB"
        sys.stdout.write(f"{prefix}, {text}\n" if prefix else f"{text}\n")

    def get_data_info(self) -> str:
        """Return one line per column and meta value: name, shape and dtype, or the type."""
        lines = [f"batch.{key}: {tuple(value.shape)} {value.dtype}" for key, value in self._tensors().items()]
        lines += [f"non_tensor_batch.{key}: {v.shape} {v.dtype}" for key, v in self.non_tensor_batch.items()]
        lines += [f"meta_info.{key}: {type(value).__name__}" for key, value in self.meta_info.items()]
        return "\n".join(lines)


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
