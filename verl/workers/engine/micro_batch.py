"""Cuts a rank's samples into micro-batches: of their real tokens alone, or with padding that costs little.

Packed, the sequences of a micro-batch lie one behind the other in one row. Otherwise each has a row of its own, padded
on the right to the longest: under causal attention no real token sees the padding behind it, so no attention mask is
needed and positions simply count up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
import torch.distributed as dist

from verl.protocol import DataProto
from verl.workers.engine.packed_attention import PackedSequences


@dataclass(frozen=True)
class MicroBatching:
    """How much goes through the model at once; exactly one of the two is set.

    Attributes:
        size: samples.
        max_tokens: tokens, padding included where there is any.
    """

    size: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if (self.size is None) == (self.max_tokens is None):
            raise ValueError(
                f"micro-batching by size={self.size} samples and max_tokens={self.max_tokens}: set exactly one of the "
                "two (*_micro_batch_size_per_gpu, or use_dynamic_bsz with *_max_token_len_per_gpu)"
            )
        limit = self.max_tokens if self.size is None else self.size
        if limit < 1:
            raise ValueError(f"micro-batching by size={self.size} or max_tokens={self.max_tokens}: must be positive")


def micro_batching(use_dynamic_bsz: bool, micro_batch_size: int | None, max_token_len: int | None) -> MicroBatching:
    """The limits that a section's three keys stand for."""
    return MicroBatching(max_tokens=max_token_len) if use_dynamic_bsz else MicroBatching(size=micro_batch_size)


class Layout(Enum):
    """How the sequences of a micro-batch lie in what the model is given."""

    PACKED = "all of them in one row, without padding"
    ROWS = "a row each, padded to the longest"
    FULL_ROWS = "a row each, padded to the caps of prompt and response"


@dataclass
class MicroBatch:
    """b samples with N response tokens, in R rows of S positions: one row if packed, otherwise b.

    Attributes:
        input_ids: [R, S] int64.
        position_ids: [R, S] int64, from 0 in each sequence.
        sequences: where they are in their row; None if each has its own.
        tokens: those that are not padding.
        rows: [b] int64, the samples' places in the rank's batch; empty for a micro-batch of no samples, which stands
            for one sample without response tokens.
        predictors: [N] int64, places in the flattened [R * S] of the positions that predict response tokens.
        targets: [N] int64, those response tokens.
        slots: [N] int64, their places in the flattened [b * T] of the responses.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sequences: PackedSequences | None
    tokens: int
    rows: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor


class AlignedBatch:
    """A rank's samples with their real tokens moved to the left; makes micro-batches of them.

    Args:
        data: input_ids, attention_mask [B, P+T]; responses, response_mask [B, T].
        device: where the tensors go.
        layout: of the micro-batches.
    """

    def __init__(self, data: DataProto, device: torch.device, layout: Layout = Layout.PACKED):
        mask = data.batch["attention_mask"].to(device).bool()
        self.columns = {}
        self.response_mask = data.batch["response_mask"].to(device).bool()
        self.num_samples, self.response_width = self.response_mask.shape
        for name, column in data.batch.items():
            if column.shape in (self.response_mask.shape, self.response_mask.shape[:1]):
                self.columns[name] = column.to(device)
        self._device = device
        self._width = mask.shape[1]
        self._layout = layout
        # stable: real tokens keep their order
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        self._input_ids = data.batch["input_ids"].to(device).gather(1, order)
        place = mask.cumsum(dim=1) - 1
        prompt_width = self._width - self.response_width
        self._place = place[:, prompt_width:]
        if bool((self.response_mask & ((self._place < 1) | ~mask[:, prompt_width:])).any()):
            raise ValueError("response_mask marks a token that attention_mask hides or that has no token before it")
        self.lengths = mask.sum(dim=1).cpu().numpy()

    def micro_batches(self, limits: MicroBatching, group: dist.ProcessGroup | None) -> Iterator[MicroBatch]:
        """The micro-batches, as many on each rank of `group`: without samples where this rank has too few."""
        padded = self.lengths if self._layout is not Layout.FULL_ROWS else np.full_like(self.lengths, self._width)
        plan = plan_micro_batches(padded, limits, packed=self._layout is Layout.PACKED)
        for rows in equalize_counts(plan, group, self._device):
            yield self._build(rows)

    def _build(self, rows: np.ndarray) -> MicroBatch:
        packed = self._layout is Layout.PACKED
        if len(rows) == 0:
            nothing = torch.empty(0, dtype=torch.int64, device=self._device)
            input_ids, positions = self._input_ids.new_zeros(1, 2), torch.arange(2, device=self._device).unsqueeze(0)
            sequences = PackedSequences([2]) if packed else None
            return MicroBatch(input_ids, positions, sequences, 0, nothing, nothing, nothing, nothing)
        index = torch.as_tensor(rows, device=self._device)
        lengths = self.lengths[rows]
        length = self._width if self._layout is Layout.FULL_ROWS else int(lengths.max())
        input_ids = self._input_ids[index, :length]
        positions = torch.arange(length, device=self._device).expand_as(input_ids)
        starts = np.arange(len(rows)) * length
        if packed:
            starts = lengths.cumsum() - lengths
            real = positions < torch.as_tensor(lengths, device=self._device).unsqueeze(1)
            input_ids, positions = input_ids[real].unsqueeze(0), positions[real].unsqueeze(0)
        sample, column = self.response_mask[index].nonzero(as_tuple=True)
        place = torch.as_tensor(starts, device=self._device)[sample] + self._place[index][sample, column]
        return MicroBatch(
            input_ids=input_ids,
            position_ids=positions,
            sequences=PackedSequences(lengths.tolist()) if packed else None,
            tokens=int(lengths.sum()),
            rows=index,
            predictors=place - 1,
            targets=input_ids.reshape(-1)[place],
            slots=sample * self.response_width + column,
        )


def plan_micro_batches(lengths: np.ndarray, limits: MicroBatching, *, packed: bool = True) -> list[np.ndarray]:
    """Group samples of like length: a list of index arrays, the longest samples first.

    Args:
        lengths: tokens of each sample.
        packed: a sample takes its own tokens; otherwise as many as the longest of its micro-batch.

    Raises:
        ValueError: a sample alone exceeds `limits.max_tokens`.
    """
    order = np.argsort(-lengths, kind="stable")
    if limits.size is not None:
        return [order[i : i + limits.size] for i in range(0, len(order), limits.size)]
    if len(order) and lengths[order[0]] > limits.max_tokens:
        raise ValueError(
            f"a sequence of {lengths[order[0]]} tokens does not fit into *_max_token_len_per_gpu={limits.max_tokens} "
            "tokens: raise that limit to at least data.max_prompt_length + data.max_response_length"
        )
    plan, start = [], 0
    while start < len(order):
        rest = lengths[order[start:]]
        taken = rest.cumsum() if packed else rest[0] * np.arange(1, len(rest) + 1)
        count = int((taken <= limits.max_tokens).sum())
        plan.append(order[start : start + count])
        start += count
    return plan


def equalize_counts(plan: list[np.ndarray], group: dist.ProcessGroup | None, device: torch.device) -> list[np.ndarray]:
    """The same samples in as many micro-batches as the rank with the most: every one is a collective operation."""
    if group is None or dist.get_world_size(group) == 1:
        return plan
    count = torch.tensor([len(plan)], dtype=torch.int64, device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    plan = list(plan)
    while len(plan) < int(count):
        largest = max(range(len(plan)), key=lambda i: len(plan[i]), default=None)
        if largest is None or len(plan[largest]) < 2:
            plan.append(np.empty(0, dtype=np.int64))
            continue
        half = len(plan[largest]) // 2
        plan[largest : largest + 1] = [plan[largest][:half], plan[largest][half:]]
    return plan
