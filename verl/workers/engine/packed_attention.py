"""Attention among sequences that lie one behind the other in a single row, so that nothing has to be padded.

Everything else in a transformer works on each token by itself. In attention, sequences of one length go together: one
call of torch's causal kernel for each length, no mask, and no work between sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "verl_packed_sdpa"
_LAYERS = {"full_attention", "sliding_attention"}


class PackedSequences:
    """Where the sequences of a row are; the model hands it to each of its attention layers.

    Args:
        lengths: tokens of each sequence, in order.

    Attributes:
        runs: how many sequences of which length follow one another.
    """

    def __init__(self, lengths: Sequence[int]):
        self.runs = [(len(list(same)), length) for length, same in groupby(lengths) if length]
        self._seen = False

    def check_seen(self, model: PreTrainedModel) -> None:
        """Raise unless an attention layer has asked: the sequences would have seen one another."""
        if not self._seen:
            raise _not_packable(model)

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sliding_window: int | None,
        **options: Any,
    ) -> torch.Tensor:
        """Causal attention of each sequence to itself.

        Args:
            query, key, value: [1, heads, N, D], the last two with as many heads or a divisor of them.
            sliding_window: tokens that each one sees, itself included.

        Returns:
            [1, N, heads, D].
        """
        self._seen = True
        sizes = [count * length for count, length in self.runs]
        outputs = []
        for (count, length), *parts in zip(
            self.runs, *(x.split(sizes, dim=2) for x in (query, key, value)), strict=True
        ):
            rows = (part.squeeze(0).unflatten(1, (count, length)).transpose(0, 1) for part in parts)
            mask = _window(length, sliding_window, query.device)
            outputs.append(sdpa_attention_forward(module, *rows, mask, **options)[0].flatten(0, 1))
        return torch.cat(outputs).unsqueeze(0)


def pack_attention(model: PreTrainedModel) -> bool:
    """Have a model's attention work on packed sequences; False, and no change, where it cannot.

    It can where every layer that mixes tokens is causal attention by torch's `scaled_dot_product_attention`, reached
    through transformers' attention interface.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or _LAYERS)
    plain = model._supports_attention_backend and not model._is_stateful and kinds <= _LAYERS
    if not plain or config._attn_implementation != "sdpa":
        return False
    AttentionInterface.register(_NAME, _packed_sdpa)
    model.set_attn_implementation(_NAME)
    return True


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
    """As transformers calls it, with the keyword that the model's caller gave."""
    if packed_sequences is None:
        raise _not_packable(module)
    return packed_sequences.attend(module, query, key, value, sliding_window, **options), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """[1, 1, length, length] bool, what each token sees; None where that is all before it, which the kernel knows."""
    if sliding_window is None or length <= sliding_window:
        return None
    place = torch.arange(length, device=device)
    distance = place.unsqueeze(1) - place
    return ((distance >= 0) & (distance < sliding_window))[None, None]


def _not_packable(module: torch.nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__} does not hand its keywords to its attention layers, so sequences cannot share a row: "
        "set use_remove_padding=False in its model section"
    )
