"""Padded columns of prompts and responses: prompts end, and responses begin, at the same index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def pad_samples(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token_id: int
) -> dict[str, np.ndarray]:
    """Pad B prompts on the left and their responses on the right, to the longest of each.

    Returns:
        `prompts` [B, P], `responses` [B, T], and both together as `input_ids`, with `attention_mask` and
        `position_ids`, [B, P + T], all int64. T is at least 1, so that a batch of empty responses is not empty in its
        second dimension.
    """
    prompt_width = max(map(len, prompts))
    prompt_part = pad_right([row[::-1] for row in prompts], prompt_width, pad_token_id)[:, ::-1]
    response_width = max(1, *map(len, responses))
    response_part = pad_right(responses, response_width, pad_token_id)
    columns = np.arange(prompt_width + response_width)
    first = np.array([[prompt_width - len(row)] for row in prompts])
    end = np.array([[prompt_width + len(row)] for row in responses])
    attention_mask = ((columns >= first) & (columns < end)).astype(np.int64)
    return {
        "prompts": prompt_part.copy(),
        "responses": response_part,
        "input_ids": np.concatenate([prompt_part, response_part], axis=1),
        "attention_mask": attention_mask,
        "position_ids": np.maximum(attention_mask.cumsum(axis=1) - 1, 0),
    }


def pad_right(rows: Sequence[Sequence[Any]], width: int, fill: float, dtype: npt.DTypeLike = np.int64) -> np.ndarray:
    """Return the rows as an array [B, width] of `dtype`, with `fill` after the end of each."""
    padded = np.full((len(rows), width), fill, dtype)
    for values, row in zip(padded, rows, strict=True):
        values[: len(row)] = row
    return padded
