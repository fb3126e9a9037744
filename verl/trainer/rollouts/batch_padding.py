"""Joining batches whose prompts and responses were padded to different widths."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from verl.protocol import DataProto

# What a padded position holds where it is not 0; position ids go on as the last one did.
_TOKEN_COLUMNS = ("prompts", "responses", "input_ids")
_FILL = {"weight_versions": -1}


def pad_and_concat(batches: Sequence[DataProto], pad_token_id: int) -> DataProto:
    """One batch with the rows of all, as if they had been laid out together.

    Tensors are aligned by their second dimension, which differs between batches: `prompts` [B, P, ...] get padding on
    the left; those as wide as `responses` [B, T, ...] on the right; those as wide as both [B, P + T, ...] on either
    side; others have to be equally wide everywhere. Padding is `pad_token_id` in columns of tokens, -1 in
    `weight_versions`, the last position in `position_ids`, and 0 (False) elsewhere. Columns then shrink to the longest
    prompt and response that `attention_mask` shows, so that padding for rows that were dropped goes.

    A non-tensor column that a batch lacks (an extra value that none of its rewards had) is filled with None.

    Args:
        batches: at least one, with the columns `prompts`, `responses` and `attention_mask`.
        pad_token_id: of the tokenizer.

    Returns:
        A new batch; `meta_info` as `DataProto.concat` joins it.

    Raises:
        ValueError: no batch, different tensor columns, or a column of a width that belongs to none of these.
    """
    if not batches:
        raise ValueError("pad_and_concat: got no batch; pass at least one")
    widths = [_widths(batch) for batch in batches]
    names = {name for batch in batches for name in batch.batch.keys()}  # noqa: SIM118 - a TensorDict iterates rows
    layout = {name: _layout(name, batches, widths) for name in names}
    prompt_width = max(_longest(batch, slice(None, p)) for batch, (p, _) in zip(batches, widths, strict=True))
    response_width = max(1, *(_longest(batch, slice(p, None)) for batch, (p, _) in zip(batches, widths, strict=True)))
    objects = {name: None for batch in batches for name in batch.non_tensor_batch}
    padded = []
    for batch, (p, t) in zip(batches, widths, strict=True):
        left, right = prompt_width - p, response_width - t
        tensors = {
            name: _pad(name, column, *_sides(layout[name], left, right), pad_token_id)
            for name, column in batch.batch.items()
        }
        missing = {name: np.full(len(batch), None, object) for name in objects if name not in batch.non_tensor_batch}
        padded.append(DataProto.from_dict(tensors, {**batch.non_tensor_batch, **missing}, batch.meta_info))
    return DataProto.concat(padded)


def _widths(batch: DataProto) -> tuple[int, int]:
    assert batch.batch is not None
    return batch.batch["prompts"].shape[1], batch.batch["responses"].shape[1]


def _longest(batch: DataProto, part: slice) -> int:
    """Columns of `part` from the first to the last that any row uses: prompts end, and responses start, at a token."""
    assert batch.batch is not None
    used = batch.batch["attention_mask"][:, part].any(dim=0)
    columns = torch.nonzero(used).flatten()
    if not len(columns):
        return 0
    return len(used) - int(columns[0]) if part.start is None else int(columns[-1]) + 1


def _layout(name: str, batches: Sequence[DataProto], widths: Sequence[tuple[int, int]]) -> str:
    """`prompt`, `response`, `both` or `fixed`: to which of the widths the second dimension of a column belongs."""
    if name == "prompts":
        return "prompt"
    columns = [batch.batch.get(name, None) for batch in batches if batch.batch is not None]
    shapes = [None if column is None else tuple(column.shape[1:]) for column in columns]
    if all(shapes):
        if all(shape[0] == t for shape, (_, t) in zip(shapes, widths, strict=True)):
            return "response"
        if all(shape[0] == p + t for shape, (p, t) in zip(shapes, widths, strict=True)):
            return "both"
    if None not in shapes and len(set(shapes)) == 1:
        return "fixed"
    expected = [f"{t} (responses) or {p + t} (with prompts)" for p, t in widths]
    raise ValueError(
        f"pad_and_concat: column {name!r} has rows of shape {shapes} (None: not there), where the batches have widths "
        f"{expected}; give it to every batch with one of these, or one width everywhere"
    )


def _sides(layout: str, left: int, right: int) -> tuple[int, int]:
    return {"prompt": (left, 0), "response": (0, right), "both": (left, right), "fixed": (0, 0)}[layout]


def _pad(name: str, column: torch.Tensor, left: int, right: int, pad_token_id: int) -> torch.Tensor:
    """`column` [B, W, ...] with columns added, or for a negative number cut off, on either side."""
    if left == right == 0:
        return column
    sides = (0, 0) * (column.dim() - 2) + (left, right)
    if name != "position_ids":
        return F.pad(column, sides, value=pad_token_id if name in _TOKEN_COLUMNS else _FILL.get(name, 0))
    padded = F.pad(column, sides)
    if right > 0:
        padded[:, -right:] = column[:, -1:]
    return padded
