"""The transaction without an engine: buckets, manifest, receiver, and the driver's part."""

import asyncio
import multiprocessing
import os

import pytest
import torch

from verl.workers.rollout.weight_sync.bucket import BucketWriter, read_bucket
from verl.workers.rollout.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_arrived
from verl.workers.rollout.weight_sync.receiver import WeightReceiver
from verl.workers.rollout.weight_sync.sender import WeightSender
from verl.workers.rollout.weight_sync.shm import SegmentReader, SharedSegment
from verl.workers.rollout.weight_sync.update import update_weights


class DictSession:
    """A `LoadSession` over a dict: the smallest engine there is."""

    def __init__(self, names):
        self.expected = list(names)
        self.weights, self.loaded, self.finished = {}, {}, 0

    def begin(self):
        self.loaded = {}

    def load(self, named_tensors):
        self.loaded |= {name: tensor.clone() for name, tensor in named_tensors}

    def unwritten(self):
        return [name for name in self.expected if name not in self.loaded]

    def finish(self):
        self.weights = dict(self.loaded)
        self.finished += 1


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed": (13, 7),
        "odd": (3,),
        "scalar": (),
        "big": (100, 30),
        "tail": (5, 5),
        "empty": (0, 4),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["half"] = torch.randn(9, 3, generator=generator).bfloat16()
    tensors["bytes"] = torch.arange(11, dtype=torch.uint8)
    tensors["fp8"] = torch.randn(4, 32, generator=generator).to(torch.float8_e4m3fn)
    tensors["strided"] = torch.randn(6, 8, generator=generator).t()
    return tensors


def buckets_of(tensors, bucket_bytes, version=1):
    sender = WeightSender(bucket_bytes)
    sender.begin(version, tensors.items())
    while True:
        bucket = sender.next_bucket()
        yield bucket, sender
        if bucket["last"]:
            return


def send(receiver, tensors, bucket_bytes=1 << 20, version=1):
    receiver.begin(version)
    for bucket, _sender in buckets_of(tensors, bucket_bytes, version):
        receiver.load_bucket(bucket)
    return receiver.finish(_sender.manifest())


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].contiguous().flatten().view(torch.uint8), b[k].contiguous().flatten().view(torch.uint8))
        for k in a
    )


@pytest.mark.parametrize("bucket_bytes", [1, 300, 1024, 5000, 1 << 20])
def test_every_tensor_arrives_bit_for_bit(bucket_bytes):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    for version in (1, 2, 3):
        tensors = weights(version)
        statistics = send(receiver, tensors, bucket_bytes, version)
        assert equal(receiver._session.weights, tensors)
        assert receiver.version == version
        assert statistics["bytes"] == sum(t.nbytes for t in tensors.values())


def test_a_tensor_larger_than_a_bucket_gets_a_bucket_of_its_own():
    tensors = weights()
    described = [bucket for bucket, _ in buckets_of(tensors, 1024)]
    (holder,) = [b for b in described if any(e["name"] == "big" for e in b["entries"])]
    assert [e["name"] for e in holder["entries"]] == ["big"]
    assert len(described) > 3


def test_offsets_are_aligned_for_every_dtype():
    for bucket, _ in buckets_of(weights(), 1 << 20):
        assert all(entry["offset"] % 64 == 0 for entry in bucket["entries"])


def test_bucket_stays_valid_while_the_next_one_is_filled():
    tensors = {f"w{i}": torch.full((64,), float(i)) for i in range(8)}
    sender, reader = WeightSender(256), SegmentReader()
    sender.begin(1, tensors.items())
    first = sender.next_bucket()
    views = read_bucket(reader.open(first["segment"]), first)
    sender.next_bucket()
    assert all(torch.equal(view, tensors[name]) for name, view in views)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[:1] + b[2:], "bucket 2 of version 1 arrived where bucket 1"),
        (lambda b: [b[0], b[0], *b[1:]], "bucket 0 of version 1 arrived where bucket 1"),
        (lambda b: [b[1], b[0], *b[2:]], "bucket 1 of version 1 arrived where bucket 0"),
        (lambda b: [{**b[0], "version": 7}, *b[1:]], "bucket 0 of version 7"),
        (lambda b: b[:-1], "buckets arrived, first missing parameter 'strided'"),
        (
            lambda b: [{**b[0], "entries": b[0]["entries"][1:]}, *b[1:]],
            "1 parameters did not arrive, the first is 'embed'",
        ),
        (lambda b: [{**b[0], "nbytes": 40}, *b[1:]], "'embed': its 364 bytes at offset 0 do not lie inside bucket 0"),
        (
            lambda b: [{**b[0], "entries": [{**b[0]["entries"][0], "shape": [7, 13]}, *b[0]["entries"][1:]]}, *b[1:]],
            r"'embed': sent as float32\[13, 7\] \(364 bytes\), arrived as float32\[7, 13\]",
        ),
        (
            lambda b: [
                {
                    **b[0],
                    "entries": [*b[0]["entries"], {**b[0]["entries"][0], "offset": 512, "shape": [0], "name": "ghost"}],
                },
                *b[1:],
            ],
            "parameters arrived that the sender does not list, the first is 'ghost'",
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
def test_a_spoiled_update_is_refused_by_name_and_a_whole_one_heals(spoil, words):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send(receiver, tensors)
    # Every bucket keeps memory of its own here, so that only what is spoiled on purpose is wrong.
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
    send(receiver, tensors, version=2)
    assert receiver.version == 2


def test_a_parameter_sent_twice_is_refused():
    sender = WeightSender(1 << 20)
    sender.begin(1, [("a", torch.zeros(2)), ("a", torch.zeros(2))])
    with pytest.raises(WeightUpdateError, match="'a' occurs twice"):
        sender.next_bucket()


def test_an_unwritten_engine_parameter_is_refused_by_name():
    receiver = WeightReceiver(DictSession(["a", "b"]))
    with pytest.raises(WeightUpdateError, match=r"1 parameters of the engine were not written, the first is 'b'"):
        send(receiver, {"a": torch.zeros(3)})
    assert receiver.version is None and receiver._session.finished == 0


def test_manifest_survives_plain_form_and_names_the_difference():
    manifest = Manifest(3, 2)
    manifest.add(TensorSpec("w", (2, 3), "bfloat16"))
    back = Manifest.from_plain(manifest.to_plain())
    assert back == manifest and back.nbytes == 12
    check_arrived(manifest, back)
    with pytest.raises(WeightUpdateError, match="finished version 3, the engine was loading 4"):
        check_arrived(manifest, Manifest(4, 2))


def test_unknown_dtype_is_refused():
    bucket = {"index": 0, "nbytes": 8, "entries": [{"name": "w", "shape": [2], "dtype": "nn", "offset": 0}]}
    with pytest.raises(WeightUpdateError, match="'nn'"):
        read_bucket(torch.zeros(8, dtype=torch.uint8), bucket)


def _read_in_child(handle, queue):
    queue.put(SegmentReader().open(handle)[:4].tolist())


def test_segment_is_shared_between_processes_and_leaves_no_name():
    before = set(os.listdir("/dev/shm"))
    segment = SharedSegment(1000)
    segment.bytes[:4] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(segment.handle, queue))
    child.start()
    assert queue.get() == [1, 2, 3, 4]
    child.join()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "verl" in name]
    segment.close()


def test_segment_of_a_dead_sender_is_an_error_that_says_so():
    segment = SharedSegment(10)
    handle = segment.handle
    segment.close()
    with pytest.raises(WeightUpdateError, match="cannot be opened"):
        SegmentReader().open(handle)


class LocalSender:
    def __init__(self, tensors, bucket_bytes, fail_at=None):
        self.sender, self.tensors, self.fail_at = WeightSender(bucket_bytes), tensors, fail_at
        self.sent = 0

    async def begin_export(self, version):
        self.sender.begin(version, self.tensors.items())

    async def next_bucket(self):
        if self.sent == self.fail_at:
            raise OSError("the trainer went away")
        self.sent += 1
        return self.sender.next_bucket()

    async def finish_export(self):
        return {"manifest": self.sender.manifest(), "seconds": self.sender.seconds, "encode": 0.0, "worst": None}


class LocalReceiver:
    def __init__(self, names, fail_at=None):
        self.receiver, self.fail_at, self.refusal = WeightReceiver(DictSession(names)), fail_at, None

    async def begin_update(self, version):
        self.refusal = None
        self.receiver.begin(version)

    async def load_bucket(self, bucket):
        await asyncio.sleep(0)
        if bucket["index"] == self.fail_at:
            raise ConnectionError("the worker died")
        self.receiver.load_bucket(bucket)

    async def finish_update(self, manifest):
        return self.receiver.finish(manifest)

    async def abort_update(self, reason):
        self.receiver.version, self.refusal = None, reason


async def test_driver_brings_all_receivers_to_one_version():
    tensors = weights()
    receivers = [LocalReceiver(tensors) for _ in range(2)]
    metrics = await update_weights(LocalSender(tensors, 600), receivers, 5)
    assert [r.receiver.version for r in receivers] == [5, 5]
    assert all(equal(r.receiver._session.weights, tensors) for r in receivers)
    assert metrics["weight_update/buckets"] > 2
    assert metrics["weight_update/MiB"] == sum(t.nbytes for t in tensors.values()) / 2**20


@pytest.mark.parametrize("who", ["sender", "receiver"])
async def test_after_a_death_in_the_middle_no_receiver_serves(who):
    tensors = weights()
    receivers = [LocalReceiver(tensors), LocalReceiver(tensors, fail_at=1 if who == "receiver" else None)]
    sender = LocalSender(tensors, 600, fail_at=2 if who == "sender" else None)
    with pytest.raises(WeightUpdateError, match="went away" if who == "sender" else "worker died"):
        await update_weights(sender, receivers, 5)
    assert [r.receiver.version for r in receivers] == [None, None]
    assert all("version 5 failed" in r.refusal for r in receivers)
