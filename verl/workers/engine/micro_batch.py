"""Split a rank's samples into micro-batches, packed without padding or padded to similar lengths.

In the packed layout, the sequences of a micro-batch lie one after another in one row. Ranks that share the row
(`verl.utils.sequence_ranks`) pad it to a multiple of their number, and each one keeps its part. In the
other layouts each sequence has its own row, padded on the right. Under causal attention no token attends to the padding
after it, so no attention mask is needed, and positions count up from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from verl.protocol import DataProto
from verl.utils.sampling_masks import COLUMN as SAMPLING_MASKS
from verl.utils.sampling_masks import SamplingMasks
from verl.utils.sequence_ranks import SequenceRanks
from verl.workers.engine.log_probs import KeptTokens
from verl.workers.engine.packed_attention import PackedSequences


@dataclass(frozen=True)
class MicroBatching:
    """Size limit of a micro-batch; exactly one of the two is set.

    Attributes:
        size: samples.
        max_tokens: tokens, including padding, over all ranks that share them.

    Raises:
        ValueError: both or none are set, or the limit is below 1.
    """

    size: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.size is None) == (self.max_tokens is None):
            raise ValueError(
                f"micro-batching by size={self.size} samples and max_tokens={self.max_tokens}: set exactly one of the "
                "two (*_micro_batch_size_per_gpu, or use_dynamic_bsz with *_max_token_len_per_gpu)"
            )
        if any(limit is not None and limit < 1 for limit in (self.size, self.max_tokens)):
            raise ValueError(f"micro-batching by size={self.size} or max_tokens={self.max_tokens}: must be positive")


def micro_batching(
    use_dynamic_bsz: bool, micro_batch_size: int | None, max_token_len: int | None, sequence_parallel: int
) -> MicroBatching:
    """Return the limit that a config section's three keys define.

    Args:
        max_token_len: limit of one rank.
        sequence_parallel: number of ranks that share a micro-batch.
    """
    if not use_dynamic_bsz:
        return MicroBatching(size=micro_batch_size)
    return MicroBatching(max_tokens=None if max_token_len is None else max_token_len * sequence_parallel)


class Layout(Enum):
    """Arrangement of a micro-batch's sequences in the model input."""

    PACKED = "all sequences in one row, without padding"
    ROWS = "one row per sequence, padded to the longest"
    FULL_ROWS = "one row per sequence, padded to the maximum lengths of prompt and response"


@dataclass
class MicroBatch:
    """b samples with N response tokens, in R rows of S positions: R = 1 if packed, otherwise R = b.

    Of a row that ranks share, the S positions are those of this rank, which predict n of the N tokens; else n = N.

    A micro-batch without samples (b = 0) feeds the model one dummy row, and has no response tokens.

    Attributes:
        input_ids: [R, S] int64.
        position_ids: [R, S] int64, from 0 in each sequence.
        sequences: lengths of the packed sequences; None if each sequence has its own row.
        tokens: number of tokens, without padding, over all ranks that share them.
        sample_indices: [b] int64, indices of the samples in the rank's batch.
        predictor_indices: [n] int64, indices into the flattened [R * S] of the positions that predict response tokens.
        targets: [n] int64, the response tokens that these positions predict.
        response_indices: [N] int64, indices of the response tokens in the flattened [b * T] responses.
        own: indices of the n tokens among the N.
        kept: n rows, the tokens that each target was sampled from; None without sampling masks.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sequences: PackedSequences | None
    tokens: int
    sample_indices: torch.Tensor
    predictor_indices: torch.Tensor
    targets: torch.Tensor
    response_indices: torch.Tensor
    own: slice
    kept: KeptTokens | None = None


def call_model(model: PreTrainedModel, micro_batch: MicroBatch, **options: Any) -> Any:
    """Return the model's output for a micro-batch.

    Raises:
        NotImplementedError: the sequences are packed, but the model's attention does not know that.
    """
    sequences = micro_batch.sequences
    if sequences is not None:
        options["packed_sequences"] = sequences
    output = model(input_ids=micro_batch.input_ids, position_ids=micro_batch.position_ids, **options)
    if sequences is not None:
        sequences.check_used(model)
    return output


class AlignedBatch:
    """A rank's samples with their tokens moved to the left, from which micro-batches are made.

    Args:
        data: input_ids, attention_mask [B, P+T]; responses, response_mask [B, T]; `sampling_masks` [B], optional.
        device: device of the micro-batches.
        layout: layout of the micro-batches.
        sequence: the ranks that share the micro-batches, which must be packed; all of them have the same samples.
            None: only this rank.

    Raises:
        ValueError: response_mask marks a token that attention_mask hides, or the first token of a sample.
    """

    def __init__(
        self,
        data: DataProto,
        device: torch.device,
        layout: Layout = Layout.PACKED,
        sequence: SequenceRanks | None = None,
    ):
        self._sequence = sequence or SequenceRanks()
        assert self._sequence.size == 1 or layout is Layout.PACKED, "ranks can share packed rows only"
        batch = data.batch
        assert batch is not None, "a batch to train on has tensor columns"
        mask = batch["attention_mask"].to(device).bool()
        self.columns: dict[str, torch.Tensor] = {}
        self.response_mask = batch["response_mask"].to(device).bool()
        self.num_samples, self.response_width = self.response_mask.shape
        per_token, per_sample = self.response_mask.shape, self.response_mask.shape[:1]
        for name, column in batch.items():
            if isinstance(column, torch.Tensor) and column.shape in (per_token, per_sample):
                self.columns[name] = column.to(device)
        self._device = device
        self._width = mask.shape[1]
        self._layout = layout
        # The stable sort keeps the order of the tokens.
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        self._input_ids = batch["input_ids"].to(device).gather(1, order)
        prompt_width = self._width - self.response_width
        # [B, T]: index of each response token among its sample's tokens
        self._token_index = (mask.cumsum(dim=1) - 1)[:, prompt_width:]
        if bool((self.response_mask & ((self._token_index < 1) | ~mask[:, prompt_width:])).any()):
            raise ValueError("response_mask marks a token that attention_mask hides or that has no token before it")
        self.lengths = mask.sum(dim=1).cpu().numpy()
        masks = data.non_tensor_batch.get(SAMPLING_MASKS)
        self._masks = None if masks is None else _MaskTable(masks.tolist(), self.response_width, device)

    def micro_batches(self, limits: MicroBatching, group: dist.ProcessGroup | None) -> Iterator[MicroBatch]:
        """Iterate over the micro-batches, the same number on each rank of `group`; some may have no samples."""
        lengths = self.lengths if self._layout is not Layout.FULL_ROWS else np.full_like(self.lengths, self._width)
        plan = plan_micro_batches(lengths, limits, packed=self._layout is Layout.PACKED)
        for samples in equalize_counts(plan, group, self._device):
            yield self._build(samples)

    def _build(self, samples: np.ndarray) -> MicroBatch:
        packed = self._layout is Layout.PACKED
        if len(samples) == 0:
            nothing = torch.empty(0, dtype=torch.int64, device=self._device)
            input_ids, positions = self._input_ids.new_zeros(1, 2), torch.arange(2, device=self._device).unsqueeze(0)
            dummy = MicroBatch(input_ids, positions, None, 0, nothing, nothing, nothing, nothing, slice(0, 0))
            return self._share(dummy, [2]) if packed else dummy
        index = torch.as_tensor(samples, device=self._device)
        lengths = self.lengths[samples]
        length = self._width if self._layout is Layout.FULL_ROWS else int(lengths.max())
        input_ids = self._input_ids[index, :length]
        positions = torch.arange(length, device=self._device).expand_as(input_ids)
        starts = np.arange(len(samples)) * length
        if packed:
            starts = lengths.cumsum() - lengths
            real = positions < torch.as_tensor(lengths, device=self._device).unsqueeze(1)
            input_ids, positions = input_ids[real].unsqueeze(0), positions[real].unsqueeze(0)
        sample, column = self.response_mask[index].nonzero(as_tuple=True)
        # indices of the response tokens in the flattened input_ids
        token = torch.as_tensor(starts, device=self._device)[sample] + self._token_index[index][sample, column]
        micro_batch = MicroBatch(
            input_ids=input_ids,
            position_ids=positions,
            sequences=None,
            tokens=int(lengths.sum()),
            sample_indices=index,
            predictor_indices=token - 1,
            targets=input_ids.reshape(-1)[token],
            response_indices=sample * self.response_width + column,
            own=slice(0, len(token)),
        )
        if packed:
            micro_batch = self._share(micro_batch, lengths.tolist())
        if self._masks is not None:
            micro_batch.kept = self._masks.kept(index[sample[micro_batch.own]], column[micro_batch.own])
        return micro_batch

    def _share(self, whole: MicroBatch, lengths: list[int]) -> MicroBatch:
        """Return this rank's part of a packed row, which is padded to a multiple of the ranks that share it.

        Args:
            whole: the row without `sequences`.
            lengths: tokens of its sequences.
        """
        size, tokens = self._sequence.size, whole.input_ids.shape[1]
        padding = -tokens % size
        sequences = PackedSequences([*lengths, padding], self._sequence)
        if size == 1:
            return replace(whole, sequences=sequences)
        width = (tokens + padding) // size
        first = self._sequence.rank * width
        end = torch.arange(padding, device=self._device).unsqueeze(0)
        # The predictors ascend, so those of this rank's positions are neighbors.
        bounds = torch.tensor([first, first + width], device=self._device)
        own = slice(*torch.searchsorted(whole.predictor_indices, bounds).tolist())
        return replace(
            whole,
            input_ids=torch.cat([whole.input_ids, torch.zeros_like(end)], dim=1)[:, first : first + width],
            position_ids=torch.cat([whole.position_ids, end], dim=1)[:, first : first + width],
            sequences=sequences,
            predictor_indices=whole.predictor_indices[own] - first,
            targets=whole.targets[own],
            own=own,
        )


class _MaskTable:
    """The sampling masks of a rank's samples, from which those of single tokens are selected.

    Args:
        masks: [B] masks of each response.
        width: padded width T of the responses.
        device: device of the micro-batches.
    """

    def __init__(self, masks: Sequence[SamplingMasks], width: int, device: torch.device):
        counts = np.zeros((len(masks), width), np.int64)
        for row, mask in zip(counts, masks, strict=True):
            row[: len(mask)] = mask.counts
        # Padding selects the last id, so that there must be one.
        self._ids = torch.from_numpy(np.concatenate([*(mask.ids for mask in masks), np.zeros(1, np.int32)])).to(device)
        self._counts = torch.from_numpy(counts).to(device)
        self._starts = self._counts.flatten().cumsum(0).view_as(self._counts) - self._counts

    def kept(self, samples: torch.Tensor, columns: torch.Tensor) -> KeptTokens:
        """Return the masks of N tokens, given by sample and index in the response, both [N] int64."""
        starts, counts = self._starts[samples, columns], self._counts[samples, columns]
        width = max(1, int(counts.max())) if len(counts) else 1
        position = torch.arange(width, device=counts.device)
        valid = position < counts.unsqueeze(1)
        index = torch.where(valid, starts.unsqueeze(1) + position, len(self._ids) - 1)
        return KeptTokens(self._ids[index].long(), valid)


def plan_micro_batches(lengths: np.ndarray, limits: MicroBatching, *, packed: bool = True) -> list[np.ndarray]:
    """Group samples of similar length.

    Args:
        lengths: [B] tokens of each sample.
        packed: True if a sample takes only its own tokens; otherwise it takes the length of its micro-batch's longest.

    Returns:
        the sample indices of each micro-batch, the longest samples first.

    Raises:
        ValueError: a single sample exceeds `limits.max_tokens`.
    """
    order = np.argsort(-lengths, kind="stable")
    if limits.size is not None:
        return [order[i : i + limits.size] for i in range(0, len(order), limits.size)]
    assert limits.max_tokens is not None
    if len(order) and lengths[order[0]] > limits.max_tokens:
        raise ValueError(
            f"a sequence of {lengths[order[0]]} tokens does not fit into a micro-batch of {limits.max_tokens} tokens "
            "(*_max_token_len_per_gpu x ulysses_sequence_parallel_size): set that limit to at least "
            "data.max_prompt_length + data.max_response_length"
        )
    plan, start = [], 0
    while start < len(order):
        rest = lengths[order[start:]]
        tokens = rest.cumsum() if packed else rest[0] * np.arange(1, len(rest) + 1)
        count = int((tokens <= limits.max_tokens).sum())
        plan.append(order[start : start + count])
        start += count
    return plan


def equalize_counts(plan: list[np.ndarray], group: dist.ProcessGroup | None, device: torch.device) -> list[np.ndarray]:
    """Split micro-batches until every rank has the same number, because each one is a collective operation.

    The number is that of the rank with the most micro-batches. A rank that cannot split further adds empty ones.
    """
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
