"""Forward passes over finished samples: full micro-batches, each sample once, columns in the order of the batch."""

import random

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses, MicroBatchAccumulator, join_parts
from verl.workers.engine.micro_batch import MicroBatching


def deliver(accumulator, lengths):
    """Add samples of these lengths; return the micro-batches that become ready and the rows that are left."""
    ready, left = [], set(range(len(lengths)))
    for row, length in enumerate(lengths):
        accumulator.add(row, f"sample {row}", length)
        while (parts := accumulator.pop_micro_batches()) is not None:
            ready.append(parts)
            rows = [row for part in parts for row, _ in part]
            assert len(set(rows)) == len(rows) and left.issuperset(rows)
            assert all(sample == f"sample {row}" for part in parts for row, sample in part)
            left.difference_update(rows)
    return ready, left


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_with_a_sample_limit_are_full(ranks):
    ready, left = deliver(MicroBatchAccumulator([MicroBatching(size=4)], ranks), [7] * 30)
    assert [[len(part) for part in parts] for parts in ready] == [[4] * ranks] * (29 // (4 * ranks))
    assert len(left) == 30 - 4 * ranks * len(ready)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_with_a_token_limit_are_full(ranks):
    lengths = random.Random(3).choices(range(5, 40), k=400)
    ready, left = deliver(MicroBatchAccumulator([MicroBatching(max_tokens=200)], ranks), lengths)
    assert len(ready) > 10 and all(len(parts) == ranks for parts in ready)
    for parts in ready:
        for part in parts:
            sizes = [lengths[row] for row, _ in part]
            assert sum(sizes) <= 200
            # One more sample of the same length would not fit.
            assert max(sizes) * (len(sizes) + 1) > 200
    assert sum(lengths[row] for row in left) <= 200 * ranks


def test_the_pass_with_the_largest_micro_batches_sets_the_size():
    limits = [MicroBatching(size=2), MicroBatching(max_tokens=100), MicroBatching(size=3)]
    ready, _ = deliver(MicroBatchAccumulator(limits, 1), [10] * 25)
    assert [len(part) for parts in ready for part in parts] == [10, 10]
    ready, _ = deliver(MicroBatchAccumulator([MicroBatching(size=12), MicroBatching(max_tokens=100)], 1), [10] * 25)
    assert [len(part) for parts in ready for part in parts] == [12, 12]


def test_without_a_pass_no_micro_batch_is_ready():
    assert deliver(MicroBatchAccumulator([], 1), [10] * 9) == ([], set(range(9)))


def test_join_parts_restores_the_order_of_the_rows():
    full = torch.arange(1, 31, dtype=torch.float32).reshape(5, 6)
    full[[1, 3], 4:] = 0.0  # columns beyond the width of the narrower part
    parts = [
        ([3, 1], DataProto.from_dict(tensors={"values": full[[3, 1], :4]})),
        ([4, 0, 2], DataProto.from_dict(tensors={"values": full[[4, 0, 2]]})),
    ]
    assert torch.equal(join_parts(parts, 6).batch["values"], full)
    assert len(join_parts([([0, 1], DataProto())], 6)) == 0


async def test_every_pass_is_timed_as_its_own_stage():
    calls = []

    def forward(name):
        async def run(batch, rank_rows):
            calls.append((name, rank_rows))
            return DataProto.from_dict(tensors={name: torch.zeros(len(batch), 2)})

        return run

    passes = ForwardPasses({"old_log_prob": forward("a"), "ref": forward("b")}, [MicroBatching(size=1)], 1)
    timing = {}
    columns = await passes.run(DataProto.from_dict(tensors={"x": torch.zeros(3, 1)}), timing)
    assert calls == [("a", None), ("b", None)]
    assert sorted(columns.batch.keys()) == ["a", "b"] and len(columns) == 3
    assert sorted(timing) == ["old_log_prob", "ref"]
