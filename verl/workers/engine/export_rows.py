"""Map the rows of a model's parameters to the tensors of the checkpoint that transformers would write.

transformers stores some weights in another form than their checkpoints, for example packed experts. The effect of its
conversion on rows is determined once, by converting index tensors; most conversions only cut between rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True)
class RowRange:
    """A checkpoint tensor that consists of adjacent rows of one parameter.

    Rows run along the last dimension; the rows of a vector are its elements.

    Attributes:
        name, shape: name and shape of the checkpoint tensor.
        first: number of its first row in the parameter.
    """

    name: str
    shape: tuple[int, ...]
    first: int

    @property
    def rows(self) -> int:
        return count_rows(self.shape)

    def shape_and_offset(self, part: torch.Tensor) -> tuple[tuple[int, ...], int]:
        """Return shape and first element of this tensor's rows in the encoded parameter.

        Args:
            part: some encoded rows of the parameter, [..., elements per row]; only the shape is read.
        """
        if part.dim() < 2:
            return self.shape, self.first
        return (*self.shape[:-1], part.shape[-1]), self.first * part.shape[-1]


def row_length(shape: tuple[int, ...]) -> int:
    """Return the number of elements per row."""
    return shape[-1] if len(shape) > 1 else 1


def count_rows(shape: tuple[int, ...]) -> int:
    """Return the number of rows."""
    return prod(shape[:-1]) if len(shape) > 1 else prod(shape)


def find_row_ranges(model: PreTrainedModel, shapes: Mapping[str, torch.Size]) -> dict[str, tuple[RowRange, ...]]:
    """Return the checkpoint tensors that each parameter is cut into between its rows.

    Args:
        shapes: shapes of the parameters that are converted together.

    Returns:
        by parameter, the ranges in the order of the rows. Parameters with rows that the conversion cuts, reorders,
        transposes or joins with those of another parameter are omitted.
    """
    if not getattr(model, "_weight_conversions", None):
        return {name: (RowRange(name, tuple(shape), 0),) for name, shape in shapes.items()}
    starts, total = {}, 0
    for name, shape in shapes.items():
        starts[name] = total
        total += count_rows(shape)
    # Both index tensors are expanded views, with memory for one row or column only. Shapes alone would not reveal that
    # a square matrix is transposed.
    rows = revert_weight_conversion(model, {name: _row_numbers(shape, starts[name]) for name, shape in shapes.items()})
    columns = revert_weight_conversion(model, {name: _column_numbers(shape) for name, shape in shapes.items()})
    if sum(numbers.numel() for numbers in rows.values()) != sum(prod(shape) for shape in shapes.values()):
        return {}
    found: dict[str, list[RowRange]] = {name: [] for name in shapes}
    for target, numbers in rows.items():
        first = _first_of_adjacent(numbers, columns[target])
        if first is not None:
            source = max((name for name in shapes if starts[name] <= first), key=starts.__getitem__)
            if row_length(shapes[source]) == row_length(numbers.shape):
                found[source].append(RowRange(target, tuple(numbers.shape), first - starts[source]))
    return {
        name: tuple(sorted(ranges, key=lambda part: part.first))
        for name, ranges in found.items()
        if _cover(ranges, count_rows(shapes[name]))
    }


def _row_numbers(shape: torch.Size, start: int) -> torch.Tensor:
    numbers = torch.arange(start, start + count_rows(shape))
    return numbers.view(*shape[:-1], 1).expand(shape) if len(shape) > 1 else numbers.view(shape)


def _column_numbers(shape: torch.Size) -> torch.Tensor:
    return torch.arange(shape[-1]).expand(shape) if len(shape) > 1 else torch.zeros(1, dtype=torch.int64).expand(shape)


def _first_of_adjacent(rows: torch.Tensor, columns: torch.Tensor) -> int | None:
    """Return the first row number of a tensor; None if its rows are not complete and adjacent in the source.

    Args:
        rows, columns: row and column number in the source of each element.
    """
    if not rows.numel():
        return None
    if rows.dim() > 1:
        ends, columns = rows.flatten(0, -2)[:, [0, -1]], columns.flatten(0, -2)
        in_order = torch.arange(columns.shape[-1])
        complete = bool((ends[:, 0] == ends[:, 1]).all()) and all(torch.equal(columns[i], in_order) for i in (0, -1))
        numbers = ends[:, 0]
    else:
        numbers, complete = rows.reshape(-1), True
    first = int(numbers[0])
    return first if complete and torch.equal(numbers, torch.arange(first, first + numbers.numel())) else None


def _cover(ranges: list[RowRange], rows: int) -> bool:
    """Return True if the ranges cover rows 0 to `rows` without gaps or overlaps."""
    end = 0
    for part in sorted(ranges, key=lambda part: part.first):
        if part.first != end:
            return False
        end += part.rows
    return end == rows


@dataclass(frozen=True)
class LocalRows:
    """The rows of a parameter that this rank holds.

    Attributes:
        first: number of the first row.
        sends: True if this rank sends its rows; if several ranks hold the same rows, one of them does.
    """

    first: int
    sends: bool


def local_rows(tensor: torch.Tensor, rank: int) -> LocalRows | None:
    """Return the rows that this rank holds; None if its shard does not consist of adjacent whole rows."""
    if not isinstance(tensor, DTensor):
        return LocalRows(0, rank == 0)
    placements = tensor.placements
    if not all(part.is_replicate() or (type(part) is Shard and part.dim == 0) for part in placements):
        return None
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, placements)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "every rank holds a part of every parameter"
    sends = all(at == 0 for at, part in zip(coordinate, placements, strict=True) if part.is_replicate())
    rows_per_index = prod(tensor.shape[1:-1]) if tensor.dim() > 1 else 1
    return LocalRows(offset[0] * rows_per_index if tensor.dim() else 0, sends)
