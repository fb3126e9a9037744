"""Tests of the receiver: full updates and deltas arrive bit for bit, and spoiled ones are refused."""

import pytest
import torch

from fixtures.updates import (
    DictSession,
    PassThrough,
    buckets_of,
    contiguous,
    delta_buckets,
    equal,
    flip_bits,
    send_delta,
    send_full,
    weights,
)
from verl.workers.weight_sync.bucket import BucketWriter
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.shm import SegmentReader


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1024, 5000, 1 << 20])
def test_every_tensor_arrives_bit_for_bit(bucket_bytes):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    for version in (1, 2, 3):
        tensors = weights(version)
        report = send_full(receiver, tensors, bucket_bytes, version)
        assert equal(receiver._session.weights, tensors)
        assert receiver.version == version
        assert report["bytes"] == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[:1] + b[2:], "received bucket 2 of version 1, expected bucket 1"),
        (lambda b: [b[0], b[0], *b[1:]], "received bucket 0 of version 1, expected bucket 1"),
        (lambda b: [b[1], b[0], *b[2:]], "received bucket 1 of version 1, expected bucket 0"),
        (lambda b: [{**b[0], "version": 7}, *b[1:]], "bucket 0 of version 7"),
        (lambda b: b[:-1], "buckets, first missing parameter 'strided'"),
        (
            lambda b: [{**b[0], "entries": b[0]["entries"][1:]}, *b[1:]],
            "1 parameters are missing, the first is 'embed'",
        ),
        (lambda b: [{**b[0], "nbytes": 40}, *b[1:]], "'embed': its 364 bytes at offset 0 do not lie inside bucket 0"),
        (
            lambda b: [{**b[0], "entries": [{**b[0]["entries"][0], "shape": [7, 13]}, *b[0]["entries"][1:]]}, *b[1:]],
            r"'embed': sent as float32\[13, 7\] \(364 bytes\), received as float32\[7, 13\]",
        ),
        (
            lambda b: [
                {
                    **b[0],
                    "entries": [*b[0]["entries"], {**b[0]["entries"][0], "offset": 512, "shape": [0], "name": "ghost"}],
                },
                *b[1:],
            ],
            "parameters that are not in the sender's manifest, the first is 'ghost'",
        ),
    ],
    ids=[
        "dropped",
        "duplicated",
        "out of order",
        "other version",
        "cut short",
        "missing",
        "truncated",
        "reshaped",
        "extra",
    ],
)
def test_spoiled_update_is_refused_by_name_and_the_next_full_update_succeeds(spoil, words):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send_full(receiver, tensors)
    # Each bucket has its own memory here, so that only the spoiled part is wrong.
    pairs = list(buckets_of(tensors, 1 << 20))
    described = []
    for name, tensor in tensors.items():
        writer = BucketWriter(8192)
        writer.add(name, tensor)
        described.append((writer, writer.seal(version=1, index=len(described), last=name == list(tensors)[-1])))
    manifest = pairs[-1][1].manifest() | {"num_buckets": len(described)}
    receiver.begin(1)
    with pytest.raises(WeightUpdateError, match=words):
        for bucket in spoil([bucket for _, bucket in described]):
            receiver.load_bucket(bucket)
        receiver.finish(manifest)
    assert receiver.version is None
    send_full(receiver, tensors, version=2)
    assert receiver.version == 2


@pytest.mark.parametrize("is_delta", [False, True], ids=["full", "delta"])
def test_bytes_that_change_after_the_sender_wrote_them_are_refused(is_delta):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send_full(receiver, tensors, version=1)
    receiver.begin(2, 1 if is_delta else None)
    changed = flip_bits(tensors, 1)
    pairs = list(delta_buckets(tensors, changed, 2, 1) if is_delta else buckets_of(changed, 1 << 20, 2))
    (bucket, _), *_ = pairs
    memory = SegmentReader().open(bucket["segment"])
    memory[bucket["nbytes"] // 2] ^= 1
    with pytest.raises(WeightUpdateError, match=r"bucket 0 of version 2: its \d+ bytes changed"):
        receiver.load_bucket(bucket)
    assert receiver.version is None
    send_full(receiver, changed, version=3)
    assert equal(receiver._session.weights, contiguous(changed))


def test_unwritten_engine_parameter_is_refused_by_name():
    receiver = WeightReceiver(DictSession(["a", "b"]))
    with pytest.raises(WeightUpdateError, match=r"1 parameters of the engine were not written, the first is 'b'"):
        send_full(receiver, {"a": torch.zeros(3)})
    assert receiver.version is None and receiver._session.finished == 0


def test_deltas_add_up_to_a_full_update():
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    assert send_full(receiver, tensors, version=0)["accepts_delta"]
    for version in range(1, 6):
        old, tensors = tensors, flip_bits(tensors, version)
        report = send_delta(receiver, old, tensors, version, version - 1)
        assert receiver.version == version
        assert equal(receiver._session.weights, contiguous(tensors))
        assert 0 < report["bytes"] < sum(t.nbytes for t in tensors.values())


def test_delta_without_changes_commits_its_version():
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send_full(receiver, tensors, version=3)
    assert send_delta(receiver, tensors, tensors, 4, 3)["bytes"] == 0
    assert receiver.version == 4


def with_chunk(bucket, **fields):
    return {**bucket, "chunks": [{**bucket["chunks"][0], **fields}]}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[1:], "received bucket 1 of version 2, expected bucket 0"),
        (lambda b: [b[0], b[0], *b[1:]], "received bucket 0 of version 2, expected bucket 1"),
        (lambda b: b[:-1], "sent num_buckets="),
        (lambda b: [{**b[0], "base": 0}, *b[1:]], "relative to version 0, expected version 1"),
        (lambda b: [{**b[0], "chunks": []}, *b[1:]], "sent num_chunks="),
        (lambda b: [with_chunk(b[0], name="ghost"), *b[1:]], "unknown parameter 'ghost' in a delta"),
        (
            lambda b: [with_chunk(b[0], shape=[91]), *b[1:]],
            r"the delta is for float32\[91\], the engine has float32\[13, 7\]",
        ),
        (lambda b: [with_chunk(b[0], dtype="int32"), *b[1:]], r"the delta is for int32\[13, 7\]"),
        (lambda b: [with_chunk(b[0], start=1000), *b[1:]], "does not lie inside it"),
        (lambda b: [with_chunk(b[0], length=2), *b[1:]], "out of range|does not lie inside it"),
    ],
    ids=["dropped", "twice", "cut short", "base", "emptied", "name", "shape", "dtype", "start", "index"],
)
def test_spoiled_delta_is_refused_and_only_a_full_update_succeeds_after_it(spoil, words):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send_full(receiver, tensors, version=1)
    with pytest.raises(WeightUpdateError, match=words):
        send_delta(receiver, tensors, flip_bits(tensors, 1), 2, 1, spoil)
    assert receiver.version is None
    with pytest.raises(WeightUpdateError, match="the engine serves no version; send a full update"):
        send_delta(receiver, tensors, flip_bits(tensors, 1), 2, 1)
    send_full(receiver, tensors, version=2)
    assert receiver.version == 2


def test_bucket_of_a_full_update_in_a_delta_is_refused():
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send_full(receiver, tensors, version=1)
    with pytest.raises(WeightUpdateError, match="relative to version None, expected version 1"):
        send_delta(receiver, tensors, flip_bits(tensors, 1), 2, 1, lambda _: [next(buckets_of(tensors, 1 << 20, 2))[0]])


def test_delta_that_is_repeated_or_comes_before_a_full_update_is_refused():
    tensors = weights()
    changed = flip_bits(tensors, 1)
    receiver = WeightReceiver(DictSession(tensors))
    with pytest.raises(WeightUpdateError, match="a delta against version 0: the engine serves no version"):
        send_delta(receiver, tensors, changed, 1, 0)
    send_full(receiver, tensors, version=0)
    send_delta(receiver, tensors, changed, 1, 0)
    with pytest.raises(WeightUpdateError, match="a delta against version 0: the engine serves version 1"):
        send_delta(receiver, tensors, changed, 1, 0)


def test_delta_is_refused_if_the_engine_quantizes():
    tensors = {"w": torch.zeros(3)}
    receiver = WeightReceiver(DictSession(tensors), PassThrough(), encodes=True)
    assert not send_full(receiver, tensors, version=0)["accepts_delta"]
    with pytest.raises(WeightUpdateError, match="the engine quantizes the weights that it receives"):
        receiver.begin(1, 0)
