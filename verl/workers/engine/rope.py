"""Rotary embeddings whose frequencies depend on the length of a sequence: choose them as the engine does.

For the rope types `longrope` and `dynamic`, transformers chooses frequencies and scale by the longest sequence of each
forward pass, so a sample's log-probabilities would change with the samples beside it. vLLM chooses once, by the longest
sequence that the engine accepts, because the keys in its cache must fit to those that follow
(`vllm/model_executor/layers/rotary_embedding`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

_LENGTH_DEPENDENT = ("longrope", "dynamic")


def fix_rope_length(model: torch.nn.Module, max_model_len: int) -> None:
    """Let every forward pass use the frequencies of a sequence of `max_model_len` tokens, in place."""
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        types = set(types.values()) if isinstance(types, dict) else {types}
        if types & set(_LENGTH_DEPENDENT):
            module.forward = partial(_forward, module.forward, max_model_len - 1)


def _forward(
    forward: Callable[..., tuple[torch.Tensor, ...]],
    last: int,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Call a rotary embedding with the engine's last position after the others, and drop its values.

    Args:
        position_ids: [..., S].

    Returns:
        cosines and sines, each [..., S, D].
    """
    longest = position_ids.new_full((*position_ids.shape[:-1], 1), last)
    # Only padding can lie behind the last position.
    positions = torch.cat([position_ids.clamp(max=last), longest], dim=-1)
    values = forward(x, positions, *args, **options)
    return tuple(value[..., :-1, :] for value in values)
