"""Samples go through forward passes as they finish: in full micro-batches, each once, and back in their places."""

import random

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses, MicroBatchAccumulator, joined
from verl.workers.engine.micro_batch import MicroBatching


def deliver(arrivals, lengths):
    """What becomes ready while samples of these lengths arrive, and then the rows that are left."""
    ready, left = [], set(range(len(lengths)))
    for row, length in enumerate(lengths):
        arrivals.add(row, f"sample {row}", length)
        while (parts := arrivals.micro_batches()) is not None:
            ready.append(parts)
            rows = [row for part in parts for row, _ in part]
            assert len(set(rows)) == len(rows) and left.issuperset(rows)
            assert all(sample == f"sample {row}" for part in parts for row, sample in part)
            left.difference_update(rows)
    return ready, left


@pytest.mark.parametrize("ranks", [1, 3])
def test_micro_batches_of_a_size(ranks):
    ready, left = deliver(MicroBatchAccumulator([MicroBatching(size=4)], ranks), [7] * 30)
    assert [[len(part) for part in parts] for parts in ready] == [[4] * ranks] * (29 // (4 * ranks))
    assert len(left) == 30 - 4 * ranks * len(ready)


@pytest.mark.parametrize("ranks", [1, 2])
def test_micro_batches_of_a_token_budget_are_full(ranks):
    lengths = random.Random(3).choices(range(5, 40), k=400)
    ready, left = deliver(MicroBatchAccumulator([MicroBatching(max_tokens=200)], ranks), lengths)
    assert len(ready) > 10 and all(len(parts) == ranks for parts in ready)
    for parts in ready:
        for part in parts:
            sizes = [lengths[row] for row, _ in part]
            assert sum(sizes) <= 200
            # One more of the same length would not have fitted.
            assert max(sizes) * (len(sizes) + 1) > 200
    assert sum(lengths[row] for row in left) <= 200 * ranks


def test_the_pass_with_the_largest_micro_batches_decides():
    limits = [MicroBatching(size=2), MicroBatching(max_tokens=100), MicroBatching(size=3)]
    ready, _ = deliver(MicroBatchAccumulator(limits, 1), [10] * 25)
    assert [len(part) for parts in ready for part in parts] == [10, 10]
    ready, _ = deliver(MicroBatchAccumulator([MicroBatching(size=12), MicroBatching(max_tokens=100)], 1), [10] * 25)
    assert [len(part) for parts in ready for part in parts] == [12, 12]


def test_without_a_pass_nothing_is_ever_ready():
    assert deliver(MicroBatchAccumulator([], 1), [10] * 9) == ([], set(range(9)))


def test_columns_go_back_to_their_rows():
    whole = torch.arange(1, 31, dtype=torch.float32).reshape(5, 6)
    whole[[1, 3], 4:] = 0.0  # what a narrower part does not have
    parts = [
        ([3, 1], DataProto.from_dict(tensors={"values": whole[[3, 1], :4]})),
        ([4, 0, 2], DataProto.from_dict(tensors={"values": whole[[4, 0, 2]]})),
    ]
    assert torch.equal(joined(parts, 6).batch["values"], whole)
    assert len(joined([([0, 1], DataProto())], 6)) == 0


async def test_every_pass_runs_with_a_stage_of_its_own():
    calls = []

    def forward(name):
        async def run(batch, parts):
            calls.append((name, parts))
            return DataProto.from_dict(tensors={name: torch.zeros(len(batch), 2)})

        return run

    passes = ForwardPasses({"old_log_prob": forward("a"), "ref": forward("b")}, [MicroBatching(size=1)], 1)
    timing = {}
    columns = await passes.run(DataProto.from_dict(tensors={"x": torch.zeros(3, 1)}), timing)
    assert calls == [("a", None), ("b", None)]
    assert sorted(columns.batch.keys()) == ["a", "b"] and len(columns) == 3
    assert sorted(timing) == ["old_log_prob", "ref"]
