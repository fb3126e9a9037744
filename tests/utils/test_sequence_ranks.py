"""Division of heads among ranks; `tests/workers/engine/test_sequence_parallel.py` tests the exchange."""

import itertools

import pytest
import torch

from verl.utils.sequence_ranks import SequenceRanks, _copies_of_heads


def test_a_size_that_does_not_divide_the_query_heads_is_an_error():
    sequence = SequenceRanks()
    sequence.size = 4
    query, key = torch.zeros(1, 6, 2, 8), torch.zeros(1, 2, 2, 8)
    with pytest.raises(ValueError, match="ulysses_sequence_parallel_size=4: must divide the 6 query heads"):
        sequence.to_heads(query, key, key)


def test_each_rank_gets_the_key_value_heads_of_its_query_heads():
    for heads, kv_heads, size in itertools.product(range(1, 25), range(1, 25), range(2, 9)):
        if heads % kv_heads or heads % size:
            continue
        group = heads // kv_heads
        copies = _copies_of_heads(group, kv_heads, size)
        assert copies == 1 if kv_heads % size == 0 else copies > 1
        sent = torch.arange(kv_heads).repeat_interleave(copies).view(size, -1)
        for queries, held in zip(torch.arange(heads).view(size, -1), sent, strict=True):
            assert held.repeat_interleave(len(queries) // len(held)).tolist() == (queries // group).tolist()
