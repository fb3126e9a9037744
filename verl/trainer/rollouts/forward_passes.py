"""Log-probabilities and values of samples, computed in full micro-batches while others are still being generated.

What is computed for a sample does not depend on which samples go through the model with it, so the columns are those of
one pass over the whole batch (up to rounding).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import torch

from verl.protocol import DataProto
from verl.utils.timing import marked_timer
from verl.workers.engine.micro_batch import MicroBatching, plan_micro_batches

T = TypeVar("T")

# A batch, and the rows of each rank where these are chosen already -> its columns [b, t].
Pass = Callable[[DataProto, Sequence[np.ndarray] | None], Awaitable[DataProto]]


class ForwardPasses:
    """What a run computes for every sample before it trains on it.

    Args:
        passes: by the name of its stage, each forward pass.
        limits: of their micro-batches.
        ranks: of the trainer.
    """

    def __init__(self, passes: Mapping[str, Pass], limits: Sequence[MicroBatching], ranks: int):
        self._passes, self._limits, self._ranks = passes, limits, ranks

    def arrivals(self) -> MicroBatchAccumulator:
        """For the samples of a batch that go through the passes as they finish."""
        return MicroBatchAccumulator(self._limits, self._ranks)

    async def run(
        self, batch: DataProto, timing: MutableMapping[str, float], parts: Sequence[np.ndarray] | None = None
    ) -> DataProto:
        """The columns of every pass over `batch`, one pass after the other; `parts` are the rows of each rank."""
        columns = DataProto()
        for stage, forward in self._passes.items():
            with marked_timer(stage, timing):
                columns = columns.union(await forward(batch, parts))
        return columns


class MicroBatchAccumulator(Generic[T]):
    """Finished samples that wait for enough others to fill a micro-batch on every rank.

    Args:
        limits: of each forward pass that the samples will go through.
        ranks: of the trainer.
    """

    def __init__(self, limits: Sequence[MicroBatching], ranks: int):
        self._limits, self._ranks = tuple(dict.fromkeys(limits)), ranks
        self._waiting: list[tuple[int, T]] = []
        self._lengths: list[int] = []

    def add(self, row: int, sample: T, tokens: int) -> None:
        """A sample has finished: number `row` of its batch, of so many tokens, prompt included."""
        self._waiting.append((row, sample))
        self._lengths.append(tokens)

    def micro_batches(self) -> list[list[tuple[int, T]]] | None:
        """(row, sample) of a micro-batch for each rank, which no longer wait; None as long as one would not be full."""
        if not self._limits or not all(self._more_than_full(limits) for limits in self._limits):
            return None
        lengths = np.asarray(self._lengths)
        # Of the pass with the largest micro-batches; those of others are cut from them. All but the last are full.
        plan = min((plan_micro_batches(lengths, limits) for limits in self._limits), key=len)[: self._ranks]
        chosen = [[self._waiting[i] for i in part] for part in plan]
        left = sorted(set(range(len(lengths))).difference(*(part.tolist() for part in plan)))
        self._waiting, self._lengths = [self._waiting[i] for i in left], [self._lengths[i] for i in left]
        return chosen

    def _more_than_full(self, limits: MicroBatching) -> bool:
        """Whether more waits than one micro-batch a rank holds."""
        if limits.size is not None:
            return len(self._waiting) > limits.size * self._ranks
        return sum(self._lengths) > limits.max_tokens * self._ranks


def joined(parts: Sequence[tuple[Sequence[int], DataProto]], width: int) -> DataProto:
    """Columns of a whole batch from those of its parts.

    Args:
        parts: row numbers and, for these rows in this order, columns [b, t], t at most `width`; together every row
            once, with the same columns in each part.
        width: T, the padded response width of the batch.

    Returns:
        the columns [B, T], 0 where a part was narrower.
    """
    size = sum(len(rows) for rows, _ in parts)
    columns: dict[str, torch.Tensor] = {}
    for rows, part in parts:
        for name, column in ({} if part.batch is None else part.batch).items():
            whole = columns.setdefault(name, column.new_zeros(size, width))
            whole[torch.as_tensor(rows), : column.shape[1]] = column
    return DataProto.from_dict(tensors=columns)
