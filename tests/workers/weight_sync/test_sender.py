"""Tests of the buckets of an update: their number at the same time, and the delta blocks that they hold."""

import pytest
import torch

from verl.workers.weight_sync.bucket import read_bucket
from verl.workers.weight_sync.delta import DeltaBlock, DeltaChunk, decode
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.sender import WeightSender
from verl.workers.weight_sync.shm import SegmentReader


def tensors(count, numel=1000):
    generator = torch.Generator().manual_seed(0)
    return {f"w{i}": torch.randn(numel, generator=generator) for i in range(count)}


@pytest.mark.parametrize("in_flight", [2, 3, 5])
def test_bucket_stays_valid_until_as_many_more_are_requested(in_flight):
    sender, reader = WeightSender(4096, in_flight), SegmentReader()
    weights = tensors(12)
    sender.begin(1, weights.items())
    views = []
    for index, (name, tensor) in enumerate(weights.items()):
        bucket = sender.next_bucket()
        assert bucket["index"] == index and bucket["last"] == (index == 11)
        views += read_bucket(reader.open(bucket["segment"]), bucket)
        assert [seen for seen, _ in views[-in_flight:]] == list(weights)[max(0, index + 1 - in_flight) : index + 1]
        assert all(torch.equal(view, weights[seen]) for seen, view in views[-in_flight:])
        assert views[-1][0] == name and torch.equal(views[-1][1], tensor)
    assert not torch.equal(views[0][1], weights["w0"])


def test_bucket_stays_valid_while_the_next_one_is_filled():
    weights = {f"w{i}": torch.full((64,), float(i)) for i in range(8)}
    sender, reader = WeightSender(256), SegmentReader()
    sender.begin(1, weights.items())
    first = sender.next_bucket()
    views = read_bucket(reader.open(first["segment"]), first)
    sender.next_bucket()
    assert all(torch.equal(view, weights[name]) for name, view in views)


@pytest.mark.parametrize("in_flight", [2, 4])
def test_memory_is_bounded_by_the_buckets_in_flight(in_flight):
    bucket_bytes, reader = 1 << 20, SegmentReader()
    sender = WeightSender(bucket_bytes, in_flight)
    for version in (1, 2):
        sender.begin(version, tensors(64, 100_000).items())
        segments, last = {}, False
        while not last:
            bucket = sender.next_bucket()
            last = bucket["last"]
            segments[bucket["segment"]["fd"]] = reader.open(bucket["segment"]).numel()
        assert len(segments) == in_flight and sum(segments.values()) <= in_flight * bucket_bytes
    assert sender.manifest()["num_buckets"] == 32


def test_fewer_than_two_buckets_in_flight_are_refused():
    with pytest.raises(ValueError, match="buckets_in_flight=1: must be 2 or more"):
        WeightSender(1 << 20, 1)


def test_duplicate_name_is_refused():
    sender = WeightSender(1 << 20)
    sender.begin(1, [("a", torch.zeros(2)), ("a", torch.zeros(2))])
    with pytest.raises(WeightUpdateError, match="duplicate name 'a'"):
        sender.next_bucket()


def block_of(name, values):
    block = DeltaBlock()
    block.add(name, (5000,), 0, values, torch.arange(0, 5000, 50))
    return block.chunks, block.to_bytes()


@pytest.mark.parametrize(("bucket_bytes", "buckets"), [(1, 6), (1400, 3), (1 << 20, 1)])
def test_blocks_share_a_bucket_while_they_fit(bucket_bytes, buckets):
    generator = torch.Generator().manual_seed(1)
    changed = {f"w{i}": torch.randn(5000, generator=generator) for i in range(6)}
    sender, reader = WeightSender(bucket_bytes), SegmentReader()
    sender.begin_delta(7, 4, [block_of(name, values) for name, values in changed.items()])
    seen, last, count = [], False, 0
    while not last:
        bucket = sender.next_bucket()
        last, count = bucket["last"], count + 1
        assert bucket["base"] == 4 and bucket["version"] == 7 and bucket["entries"] == []
        memory = reader.open(bucket["segment"])[: bucket["nbytes"]]
        for message in bucket["chunks"]:
            chunk = DeltaChunk.from_message(message)
            indices, values = decode(memory, chunk)
            assert torch.equal(values, changed[chunk.name][indices]) and indices.tolist() == list(range(0, 5000, 50))
            seen.append(chunk.name)
    assert seen == list(changed) and count == buckets
    assert sender.manifest() == {"version": 7, "base": 4, "num_buckets": buckets, "num_chunks": 6, "num_values": 600}


def test_none_in_the_stream_ends_a_bucket_that_holds_blocks():
    changed = {f"w{i}": torch.randn(5000, generator=torch.Generator().manual_seed(i)) for i in range(2)}
    first, second = (block_of(name, values) for name, values in changed.items())
    sender = WeightSender(1 << 20)
    sender.begin_delta(7, 4, [None, first, None, None, second, None])
    names, last = [], False
    while not last:
        bucket = sender.next_bucket()
        names.append([chunk["name"] for chunk in bucket["chunks"]])
        last = bucket["last"]
    assert names == [["w0"], ["w1"], []]


def test_delta_without_changes_is_one_bucket_without_chunks():
    sender = WeightSender(1 << 20)
    sender.begin(1, tensors(2).items())
    sender.next_bucket()
    assert sender.nbytes == 8000
    sender.begin_delta(2, 1, [])
    bucket = sender.next_bucket()
    assert bucket["last"] and bucket["chunks"] == [] and bucket["nbytes"] == 0
    assert sender.manifest()["num_buckets"] == 1 and sender.manifest()["num_values"] == 0
    assert sender.nbytes == 8000


def test_aborted_update_exhausts_its_stream():
    sender, drawn = WeightSender(4096), []
    sender.begin(1, ((name, drawn.append(name) or tensor) for name, tensor in tensors(5).items()))
    sender.next_bucket()
    sender.abort()
    assert len(drawn) == 5
    sender.begin(2, tensors(1).items())
    assert sender.next_bucket()["last"]
