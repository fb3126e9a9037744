"""Forward passes over samples, in full micro-batches while other samples are still being generated.

The log-probabilities and values of a sample do not depend on the other samples of its micro-batch, so the columns equal
those of one pass over the whole batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Generic, TypeVar, cast

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.timing import marked_timer
from verl.workers.engine.micro_batch import MicroBatching, plan_micro_batches

T = TypeVar("T")

# Row numbers [b] of each shard; None to divide the rows evenly. A shard belongs to one rank, or to the ranks that share
# its sequences.
RankRows = Sequence[np.ndarray] | None
# (batch, rows of each shard) -> columns [B, T] of the batch.
ForwardPass = Callable[[DataProto, RankRows], Awaitable[DataProto]]


class ForwardPasses:
    """The forward passes that every sample of a run needs before it is trained on.

    Args:
        passes: each pass by the name of its stage, in the order in which they run.
        limits: micro-batch limits of the passes.
        shards: number of shards of a pass; the smallest one if the passes differ.
    """

    def __init__(self, passes: Mapping[str, ForwardPass], limits: Sequence[MicroBatching], shards: int):
        self._passes, self._limits, self._shards = passes, limits, shards

    def make_accumulator(self) -> MicroBatchAccumulator:
        """Build an accumulator for a batch whose samples go through the passes as they finish."""
        return MicroBatchAccumulator(self._limits, self._shards)

    async def run(self, batch: DataProto, timing: MutableMapping[str, float], rank_rows: RankRows = None) -> DataProto:
        """Run all passes over `batch`, one after the other, and return their columns [B, T]."""
        columns = DataProto()
        for stage, forward in self._passes.items():
            with marked_timer(stage, timing):
                columns = columns.union(await forward(batch, rank_rows))
        return columns


class MicroBatchAccumulator(Generic[T]):
    """Collects finished samples until they fill a micro-batch of every shard.

    Args:
        limits: micro-batch limits of each forward pass that the samples will go through.
        shards: number of shards of a pass.
    """

    def __init__(self, limits: Sequence[MicroBatching], shards: int):
        self._limits, self._shards = tuple(dict.fromkeys(limits)), shards
        self._waiting: list[tuple[int, T]] = []
        self._lengths: list[int] = []

    def add(self, row: int, sample: T, tokens: int) -> None:
        """Add a finished sample: row `row` of its batch, with `tokens` tokens, prompt included."""
        self._waiting.append((row, sample))
        self._lengths.append(tokens)

    def pop_micro_batches(self) -> list[list[tuple[int, T]]] | None:
        """Remove and return the (row, sample) pairs of one micro-batch per shard; None while one would not be full."""
        if not self._limits or not all(self._more_than_full(limits) for limits in self._limits):
            return None
        lengths = np.asarray(self._lengths)
        # Plan for the pass with the largest micro-batches; those of the other passes are cut from them. All but the
        # last micro-batch of a plan are full.
        plan = min((plan_micro_batches(lengths, limits) for limits in self._limits), key=len)[: self._shards]
        chosen = [[self._waiting[i] for i in part] for part in plan]
        left = sorted(set(range(len(lengths))).difference(*(part.tolist() for part in plan)))
        self._waiting, self._lengths = [self._waiting[i] for i in left], [self._lengths[i] for i in left]
        return chosen

    def _more_than_full(self, limits: MicroBatching) -> bool:
        """True if more samples wait than one micro-batch per shard can hold."""
        if limits.size is not None:
            return len(self._waiting) > limits.size * self._shards
        assert limits.max_tokens is not None
        return sum(self._lengths) > limits.max_tokens * self._shards


def join_parts(parts: Sequence[tuple[Sequence[int], DataProto]], width: int) -> DataProto:
    """Join the columns of the parts of a batch.

    Args:
        parts: row numbers, and columns [b, t] for these rows in this order, t at most `width`. Together the parts must
            hold every row once; all parts must have the same columns.
        width: T, the padded response width of the batch.

    Returns:
        The columns [B, T], 0 beyond the width t of a part.
    """
    size = sum(len(rows) for rows, _ in parts)
    columns: dict[str, torch.Tensor] = {}
    for rows, part in parts:
        for name, column in cast(Mapping[str, torch.Tensor], {} if part.batch is None else part.batch).items():
            full = columns.setdefault(name, column.new_zeros(size, width))
            full[torch.as_tensor(rows), : column.shape[1]] = column
    return DataProto.from_dict(tensors=columns)
