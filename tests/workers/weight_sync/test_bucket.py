"""Tests of the layout of tensors in a bucket."""

import pytest
import torch

from fixtures.updates import buckets_of, weights
from verl.workers.weight_sync.bucket import checksum, read_bucket
from verl.workers.weight_sync.manifest import WeightUpdateError


def test_tensor_larger_than_a_bucket_gets_its_own_bucket():
    described = [bucket for bucket, _ in buckets_of(weights(), 1024)]
    (holder,) = [b for b in described if any(e["name"] == "big" for e in b["entries"])]
    assert [e["name"] for e in holder["entries"]] == ["big"]
    assert len(described) > 3


def test_offsets_are_aligned_for_every_dtype():
    for bucket, _ in buckets_of(weights(), 1 << 20):
        assert all(entry["offset"] % 64 == 0 for entry in bucket["entries"])


def test_unknown_dtype_is_refused():
    bucket = {"index": 0, "nbytes": 8, "entries": [{"name": "w", "shape": [2], "dtype": "nn", "offset": 0}]}
    with pytest.raises(WeightUpdateError, match="'nn'"):
        read_bucket(torch.zeros(8, dtype=torch.uint8), bucket)


def test_checksum_is_the_weighted_sum_of_the_words():
    memory = torch.randint(0, 256, (5 * 8192 + 24,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blocks = [memory[start : start + 8192].view(torch.int64).tolist() for start in range(0, memory.numel(), 8192)]
    expected = sum((2 * i + 1) * sum(words) for i, words in enumerate(blocks))
    assert checksum(memory) % 2**64 == expected % 2**64
    assert checksum(memory[:0]) == 0


@pytest.mark.parametrize("place", [0, 8191, 8192, 5 * 8192, 5 * 8192 + 23])
def test_checksum_changes_with_every_bit(place):
    memory = torch.arange(5 * 8192 + 24).to(torch.uint8)
    original = checksum(memory)
    for bit in range(8):
        memory[place] ^= 1 << bit
        assert checksum(memory) != original
        memory[place] ^= 1 << bit


def test_checksum_changes_when_blocks_are_exchanged():
    first, second = (torch.full((8192,), value, dtype=torch.uint8) for value in (1, 2))
    assert checksum(torch.cat([first, second])) != checksum(torch.cat([second, first]))
