"""The experts of a layer as transformers computes them: which form they have, and the rows of each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.integrations import moe


def sort_by_expert(top_k_index: torch.Tensor, experts: int) -> tuple[torch.Tensor, list[int]]:
    """Return the entries of the flattened `top_k_index` [T, top k], sorted by expert, and their number by expert."""
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    # Expert parallelism marks the experts of other ranks with numbers beyond the last one.
    order = order[chosen[order] < experts]
    return order, torch.bincount(chosen[order], minlength=experts).tolist()


def rows_of_experts(x: torch.Tensor, counts: Sequence[int] | None) -> Iterator[tuple[int | None, torch.Tensor]]:
    """Iterate over the experts and their rows of x [T, K]; over None and all rows for a linear layer.

    An expert without rows is left out, but the first one.
    """
    if counts is None:
        yield None, x
        return
    for expert, rows in enumerate(x.split(list(counts))):
        if len(rows) or not expert:
            yield expert, rows


def has_plain_experts(module: Any) -> bool:
    """Return True for transformers' experts with gate and up in one weight, and without biases."""
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    if any(getattr(module, name, None) is not value for name, value in flags.items()):
        return False
    return type(module)._apply_gate is moe._default_apply_gate
