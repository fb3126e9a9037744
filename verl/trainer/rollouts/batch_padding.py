"""Join batches whose prompts and responses were padded to different widths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from verl.protocol import DataProto

# Columns padded with a value other than 0. Position ids are padded with the last position.
_TOKEN_COLUMNS = ("prompts", "responses", "input_ids")
_FILL = {"weight_versions": -1}


def pad_and_concat(batches: Sequence[DataProto], pad_token_id: int) -> DataProto:
    """Return one batch with the rows of all batches, as if they had been laid out together.

    Tensors are aligned by their second dimension, which differs between batches. `prompts` [B, P, ...] are padded on
    the left, columns as wide as `responses` [B, T, ...] on the right, and columns as wide as both [B, P + T, ...] on
    both sides. Other columns must have the same width in all batches. The padding is `pad_token_id` in token columns,
    -1 in `weight_versions`, the last position in `position_ids`, and 0 (False) elsewhere. The columns are then cut to
    the longest prompt and response by `attention_mask`, which removes the padding for dropped rows.

    A non-tensor column that a batch lacks (an extra value that none of its rewards has) is filled with None.

    Args:
        batches: at least one, with the columns `prompts`, `responses` and `attention_mask`.
        pad_token_id: padding token of the tokenizer.

    Returns:
        A new batch; `meta_info` is joined as by `DataProto.concat`.

    Raises:
        ValueError: there is no batch, the tensor columns differ, or a column has none of the widths above.
    """
    if not batches:
        raise ValueError("pad_and_concat: there is no batch; pass at least one")
    widths = [_widths(batch) for batch in batches]
    tensors_by_batch = [cast(dict[str, torch.Tensor], dict(batch.batch.items())) for batch in batches]
    names = {name for tensors in tensors_by_batch for name in tensors}
    layout = {name: _layout(name, tensors_by_batch, widths) for name in names}
    prompt_width = max(_longest(batch, slice(None, p)) for batch, (p, _) in zip(batches, widths, strict=True))
    response_width = max(1, *(_longest(batch, slice(p, None)) for batch, (p, _) in zip(batches, widths, strict=True)))
    objects = {name: None for batch in batches for name in batch.non_tensor_batch}
    padded = []
    for batch, tensors, (p, t) in zip(batches, tensors_by_batch, widths, strict=True):
        left, right = prompt_width - p, response_width - t
        columns = {
            name: _pad(name, column, *_sides(layout[name], left, right), pad_token_id)
            for name, column in tensors.items()
        }
        missing = {name: np.full(len(batch), None, object) for name in objects if name not in batch.non_tensor_batch}
        padded.append(DataProto.from_dict(columns, {**batch.non_tensor_batch, **missing}, batch.meta_info))
    return DataProto.concat(padded)


def _widths(batch: DataProto) -> tuple[int, int]:
    return batch.batch["prompts"].shape[1], batch.batch["responses"].shape[1]


def _longest(batch: DataProto, part: slice) -> int:
    """Return the width that the rows use in a part: prompts end with a token, and responses start with one."""
    used = batch.batch["attention_mask"][:, part].any(dim=0)
    columns = torch.nonzero(used).flatten()
    if not len(columns):
        return 0
    return len(used) - int(columns[0]) if part.start is None else int(columns[-1]) + 1


def _layout(name: str, tensors_by_batch: Sequence[dict[str, torch.Tensor]], widths: Sequence[tuple[int, int]]) -> str:
    """Return the layout of a column by its second dimension: `prompt`, `response`, `both` or `fixed`.

    Args:
        name: name of the column.
        tensors_by_batch: tensor columns of each batch.
        widths: P and T of each batch.
    """
    if name == "prompts":
        return "prompt"
    shapes = [tuple(tensors[name].shape[1:]) if name in tensors else None for tensors in tensors_by_batch]
    column_widths = [shape[0] for shape in shapes if shape]
    if column_widths == [t for _, t in widths]:
        return "response"
    if column_widths == [p + t for p, t in widths]:
        return "both"
    if None not in shapes and len(set(shapes)) == 1:
        return "fixed"
    expected = [f"{t} (responses) or {p + t} (with prompts)" for p, t in widths]
    raise ValueError(
        f"pad_and_concat: column {name!r} has rows of shape {shapes} (None: missing), but the batches have widths "
        f"{expected}; add it to every batch with one of these widths, or with one fixed width"
    )


def _sides(layout: str, left: int, right: int) -> tuple[int, int]:
    return {"prompt": (left, 0), "response": (0, right), "both": (left, right), "fixed": (0, 0)}[layout]


def _pad(name: str, column: torch.Tensor, left: int, right: int, pad_token_id: int) -> torch.Tensor:
    """Add columns to `column` [B, W, ...] on either side, or cut them off for a negative number."""
    if left == right == 0:
        return column
    sides = (0, 0) * (column.dim() - 2) + (left, right)
    if name != "position_ids":
        return F.pad(column, sides, value=pad_token_id if name in _TOKEN_COLUMNS else _FILL.get(name, 0))
    padded = F.pad(column, sides)
    if right > 0:
        padded[:, -right:] = column[:, -1:]
    return padded
