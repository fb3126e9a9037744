"""Attention for packed sequences: several sequences lie one after another in a single row, without padding.

All other parts of a transformer process each token separately. Attention processes runs of sequences of equal length:
one call of torch's causal kernel per run, without a mask and without work between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from verl.utils.sequence_ranks import SequenceRanks

_NAME = "verl_packed_sdpa"
_SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


class PackedSequences:
    """Lengths of the sequences in a row; the model passes it to each of its attention layers.

    Args:
        lengths: tokens of each sequence, in order.
        sequence: the ranks that share the row, each of which holds a part of its positions; None: only this rank.

    Attributes:
        runs: (count, length) of each run of consecutive sequences of equal length.
    """

    def __init__(self, lengths: Sequence[int], sequence: SequenceRanks | None = None):
        self.runs = [(len(list(same)), length) for length, same in groupby(lengths) if length]
        self._sequence = sequence or SequenceRanks()
        self._used = False

    def check_used(self, model: PreTrainedModel) -> None:
        """Check that an attention layer has called `attend`; otherwise tokens attended to other sequences.

        Raises:
            NotImplementedError: no layer did; the model cannot pack sequences.
        """
        if not self._used:
            raise _packing_error(model)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None,
        **options: Any,
    ) -> torch.Tensor:
        """Compute the causal attention of each sequence to itself.

        Args:
            query, key, value: [1, heads, n, D], of this rank's positions; the heads of key and value divide those of
                query.
            sliding_window: number of tokens that each token attends to, itself included; None for all.

        Returns:
            [1, n, heads, D].
        """
        self._used = True
        if self._sequence.size > 1:
            query, key, value = self._sequence.to_heads(query, key, value)
            module = _LocalHeads(query.shape[1] // key.shape[1], getattr(module, "is_causal", True))
        sizes = [count * length for count, length in self.runs]
        outputs = []
        for (count, length), *parts in zip(
            self.runs, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True
        ):
            q, k, v = (part.squeeze(0).unflatten(1, (count, length)).transpose(0, 1) for part in parts)
            mask = _sliding_window_mask(length, sliding_window, query.device)
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0].flatten(0, 1))
        return self._sequence.to_positions(torch.cat(outputs).unsqueeze(0))


@dataclass(frozen=True)
class _LocalHeads:
    """Attributes of an attention layer that `sdpa_attention_forward` reads, for a part of its heads."""

    num_key_value_groups: int
    is_causal: bool


def pack_attention(model: PreTrainedModel) -> bool:
    """Enable packed sequences in a model's attention.

    The model must mix tokens only by causal attention with torch's `scaled_dot_product_attention`, called through
    transformers' attention interface.

    Returns:
        False, without a change, if the model does not meet these conditions.
    """
    config = model.config
    layer_types = set(getattr(config, "layer_types", None) or _SUPPORTED_LAYER_TYPES)
    supported = model._supports_attention_backend and not model._is_stateful and layer_types <= _SUPPORTED_LAYER_TYPES
    if not supported or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _packed_sdpa)
    model.set_attn_implementation(_NAME)
    return True


def packs_sequences(model: PreTrainedModel) -> bool:
    """Return True if `pack_attention` was successful for the model."""
    return model.config._attn_implementation == _NAME


def _packed_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_sequences: PackedSequences | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function in transformers' signature; `packed_sequences` is a keyword of the call to the model."""
    if packed_sequences is None:
        raise _packing_error(module)
    return packed_sequences.attend(module, query, key, value, sliding_window, **options), None


def _sliding_window_mask(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Return the [1, 1, length, length] bool mask, None if plain causal attention, which needs no mask, suffices."""
    if sliding_window is None or length <= sliding_window:
        return None
    index = torch.arange(length, device=device)
    distance = index.unsqueeze(1) - index
    return ((distance >= 0) & (distance < sliding_window))[None, None]


def _packing_error(module: torch.nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} does not pass keyword arguments to its attention layers, so it cannot pack sequences "
        "into a row: set use_remove_padding=False in its model section"
    )
