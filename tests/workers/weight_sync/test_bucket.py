"""Tests of the layout of tensors in a bucket."""

import pytest
import torch

from fixtures.updates import buckets_of, weights
from verl.workers.weight_sync.bucket import read_bucket
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
