"""The transaction without an engine: buckets, manifest, receiver, and the driver's part."""

import asyncio
import hashlib
import logging
import multiprocessing
import os

import pytest
import torch

from verl.utils.quantization.encode_report import EncodeReport
from verl.utils.tensor_diff import bits
from verl.workers.weight_sync.bucket import BucketWriter, read_bucket
from verl.workers.weight_sync.delta import DeltaBlock
from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.manifest import Manifest, TensorSpec, WeightUpdateError, check_received
from verl.workers.weight_sync.receiver import WeightReceiver
from verl.workers.weight_sync.sender import WeightSender
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment
from verl.workers.weight_sync.updater import WeightUpdater


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

    @property
    def accepts_delta(self):
        return bool(self.weights)

    def begin_delta(self):
        self.patched = 0

    def patch(self, name, places, start, values):
        flat = bits(self.weights[name]).view(-1)
        where = torch.arange(start, start + values.numel()) if places is None else places
        flat[where] = bits(values)
        self.patched += 1

    def refresh_derived(self):
        pass

    def finish_delta(self):
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


def delta_buckets(old, new, version, base, bucket_bytes=1 << 20):
    """What changed, a bucket for each piece (with the writer that keeps its memory)."""
    pairs, writers = [], []
    for name, tensor in new.items():
        block, flat = DeltaBlock(), tensor.contiguous().view(-1)
        before = old[name].contiguous().view(-1)
        block.add(name, tuple(tensor.shape), 0, flat, (bits(flat) != bits(before)).nonzero().squeeze(-1))
        if block.chunks:
            pairs.append((block.to_bytes(), [piece.to_message() for piece in block.chunks]))
    for index, (memory, pieces) in enumerate(pairs or [(torch.empty(0, dtype=torch.uint8), [])]):
        writer = BucketWriter(bucket_bytes)
        if memory.numel():
            writer.add("", memory)
        sealed = writer.seal(version=version, index=index, last=index == max(len(pairs) - 1, 0))
        writers.append(writer)
        yield {**sealed, "entries": [], "base": base, "chunks": pieces}, writers


def delta_manifest(buckets):
    pieces = [piece for bucket in buckets for piece in bucket["chunks"]]
    return {
        "version": buckets[0]["version"],
        "base": buckets[0]["base"],
        "num_buckets": len(buckets),
        "num_chunks": len(pieces),
        "num_values": sum(piece["count"] for piece in pieces),
    }


def raw(tensor):
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


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
    back = Manifest.from_message(manifest.to_message())
    assert back == manifest and back.nbytes == 12
    check_received(manifest, back)
    with pytest.raises(WeightUpdateError, match="finished version 3, the engine was loading 4"):
        check_received(manifest, Manifest(4, 2))


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
        self.bucket_bytes, self.kept, self.kept_version, self.bases = bucket_bytes, {}, None, []
        self.aborted = 0

    async def begin_export(self, version, base):
        self.bases.append(base)
        self.sent, self.version, self.base = 0, version, base
        if base is None:
            self.sender.begin(version, self.tensors.items())
        elif base != self.kept_version:
            raise WeightUpdateError(f"the trainer keeps version {self.kept_version}, not {base}")
        else:
            self.deltas = list(delta_buckets(self.kept, self.tensors, version, base, self.bucket_bytes))

    async def next_bucket(self):
        if self.sent == self.fail_at:
            raise OSError("the trainer went away")
        self.sent += 1
        return self.sender.next_bucket() if self.base is None else self.deltas[self.sent - 1][0]

    async def finish_export(self):
        self.kept, self.kept_version = {k: t.clone() for k, t in self.tensors.items()}, self.version
        full = sum(t.nbytes for t in self.tensors.values())
        manifest = self.sender.manifest() if self.base is None else delta_manifest([b for b, _ in self.deltas])
        return {"manifest": manifest, "seconds": 0.0, "encode": 0.0, "errors": {}, "full_bytes": full}

    async def abort_export(self):
        self.aborted, self.kept_version = self.aborted + 1, None


class LocalReceiver:
    def __init__(self, names, fail_at=None):
        self.receiver, self.fail_at, self.refusal = WeightReceiver(DictSession(names)), fail_at, None
        self.fails = 1

    async def begin_update(self, version, base):
        self.refusal = None
        self.receiver.begin(version, base)

    async def load_bucket(self, bucket):
        await asyncio.sleep(0)
        if bucket["index"] == self.fail_at and self.fails:
            self.fails -= 1
            raise ConnectionError("the worker died")
        self.receiver.load_bucket(bucket)

    async def finish_update(self, manifest):
        return self.receiver.finish(manifest)

    async def abort_update(self, reason):
        self.receiver.version, self.refusal = None, reason

    async def parameter_hashes(self):
        return [{name: hashlib.sha256(raw(t)).hexdigest() for name, t in self.receiver._session.weights.items()}]


async def test_driver_brings_all_receivers_to_one_version():
    tensors = weights()
    receivers = [LocalReceiver(tensors) for _ in range(2)]
    metrics, accepts_delta = await update_weights(LocalSender(tensors, 600), receivers, 5)
    assert accepts_delta
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


# ---- deltas ----


def nudged(tensors, seed, share=0.1):
    """A copy in which this share of the elements, one in ten, has another last bit."""
    generator = torch.Generator().manual_seed(seed)
    copies = {}
    for name, tensor in tensors.items():
        flat = tensor.contiguous().clone().view(-1)
        bits(flat)[torch.rand(flat.numel(), generator=generator) < share] ^= 1
        copies[name] = flat.view(tensor.shape)
    return copies


def send_delta(receiver, old, new, version, base, spoil=lambda buckets: buckets, manifest=None):
    pairs = list(delta_buckets(old, new, version, base))
    buckets = [bucket for bucket, _ in pairs]
    receiver.begin(version, base)
    for bucket in spoil(buckets):
        receiver.load_bucket(bucket)
    return receiver.finish({**delta_manifest(buckets), **(manifest or {})})


def test_deltas_add_up_to_what_a_whole_update_brings():
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    assert send(receiver, tensors, version=0)["accepts_delta"]
    for version in range(1, 6):
        old, tensors = tensors, nudged(tensors, version)
        statistics = send_delta(receiver, old, tensors, version, version - 1)
        assert receiver.version == version
        assert equal(receiver._session.weights, {name: t.contiguous() for name, t in tensors.items()})
        assert 0 < statistics["bytes"] < sum(t.nbytes for t in tensors.values())


def test_nothing_changed_is_a_delta_too():
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send(receiver, tensors, version=3)
    assert send_delta(receiver, tensors, tensors, 4, 3)["bytes"] == 0
    assert receiver.version == 4


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b[1:], "bucket 1 of version 2 arrived where bucket 0"),
        (lambda b: [b[0], b[0], *b[1:]], "bucket 0 of version 2 arrived where bucket 1"),
        (lambda b: b[:-1], "num_buckets is"),
        (lambda b: [{**b[0], "base": 0}, *b[1:]], "relative to version 0, where 1 was due"),
        (lambda b: [{**b[0], "chunks": []}, *b[1:]], "num_chunks is"),
        (lambda b: [piece_with(b[0], name="ghost"), *b[1:]], "'ghost': a delta to .* no such parameter"),
        (lambda b: [piece_with(b[0], shape=[91]), *b[1:]], r"a delta to float32\[91\], .* given float32\[13, 7\]"),
        (lambda b: [piece_with(b[0], dtype="int32"), *b[1:]], r"a delta to int32\[13, 7\]"),
        (lambda b: [piece_with(b[0], start=1000), *b[1:]], "does not lie inside it"),
        (lambda b: [piece_with(b[0], length=2), *b[1:]], "out of range|does not lie inside it"),
    ],
    ids=["dropped", "twice", "cut short", "base", "emptied", "name", "shape", "dtype", "start", "index"],
)
def test_a_spoiled_delta_is_refused_and_only_a_whole_update_heals(spoil, words):
    tensors = weights()
    receiver = WeightReceiver(DictSession(tensors))
    send(receiver, tensors, version=1)
    with pytest.raises(WeightUpdateError, match=words):
        send_delta(receiver, tensors, nudged(tensors, 1), 2, 1, spoil)
    assert receiver.version is None
    with pytest.raises(WeightUpdateError, match="the engine has none: send everything"):
        send_delta(receiver, tensors, nudged(tensors, 1), 2, 1)
    send(receiver, tensors, version=2)
    assert receiver.version == 2


def piece_with(bucket, **changes):
    return {**bucket, "chunks": [{**bucket["chunks"][0], **changes}]}


def test_a_delta_twice_out_of_order_or_before_everything_is_refused():
    tensors = weights()
    changed = nudged(tensors, 1)
    receiver = WeightReceiver(DictSession(tensors))
    with pytest.raises(WeightUpdateError, match="a delta to version 0 arrived, the engine has none"):
        send_delta(receiver, tensors, changed, 1, 0)
    send(receiver, tensors, version=0)
    send_delta(receiver, tensors, changed, 1, 0)
    with pytest.raises(WeightUpdateError, match="a delta to version 0 arrived, the engine has version 1"):
        send_delta(receiver, tensors, changed, 1, 0)


def test_a_delta_is_refused_where_the_engine_quantizes():
    tensors = {"w": torch.zeros(3)}
    receiver = WeightReceiver(DictSession(tensors), PassThrough(), encodes=True)
    assert not send(receiver, tensors, version=0)["accepts_delta"]
    with pytest.raises(WeightUpdateError, match="the engine quantizes what arrives"):
        receiver.begin(1, 0)


class PassThrough:
    """A quantization that changes nothing."""

    def encode(self, named_tensors):
        return named_tensors

    def check_tensor(self, name, tensor, arrived):
        assert name in arrived

    def check_complete(self, arrived):
        assert arrived

    def pop_report(self):
        return EncodeReport()


async def test_a_run_sends_changes_after_everything_and_checks_them_now_and_then():
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors) for _ in range(2)]
    updates = WeightUpdater(delta=True, check_interval=3)
    seen = []
    for version in range(8):
        metrics = await updates.update(sender, receivers, version)
        seen.append((metrics["weight_update/delta"], metrics.get("weight_update/delta_mismatches")))
        expected = {name: t.contiguous() for name, t in sender.tensors.items()}
        assert all(r.receiver.version == version and equal(r.receiver._session.weights, expected) for r in receivers)
        sender.tensors = nudged(sender.tensors, version)
    assert seen == [
        (0.0, None),
        (1.0, None),
        (1.0, None),
        (1.0, 0.0),
        (1.0, None),
        (1.0, None),
        (1.0, 0.0),
        (1.0, None),
    ]
    assert sender.bases == [None, 0, 1, 2, None, 3, 4, 5, None, 6]


async def test_a_flipped_bit_is_found_by_the_check_and_mended(caplog):
    tensors = weights()
    sender, receiver = LocalSender(tensors, 600), LocalReceiver(tensors)
    updates = WeightUpdater(delta=True, check_interval=1)
    await updates.update(sender, [receiver], 0)
    bits(receiver.receiver._session.weights["big"])[17, 3] ^= 4
    metrics = await updates.update(sender, [receiver], 1)
    assert metrics["weight_update/delta_mismatches"] == 1.0
    assert "the first is big" in caplog.text
    assert equal(receiver.receiver._session.weights, {name: t.contiguous() for name, t in tensors.items()})


@pytest.mark.parametrize("who", ["sender restarted", "replica restarted", "version gap", "died in the middle"])
async def test_where_changes_alone_are_no_good_everything_is_sent(who, caplog):
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors) for _ in range(2)]
    updates = WeightUpdater(delta=True)
    await updates.update(sender, receivers, 0)
    sender.tensors = nudged(tensors, 0)
    if who == "sender restarted":
        sender.kept, sender.kept_version = {}, None
    elif who == "replica restarted":
        receivers[1] = LocalReceiver(tensors)
    elif who == "version gap":
        receivers[1].receiver.version = 7
    else:
        receivers[1].fail_at, receivers[1].fails = 1, 1
    metrics = await updates.update(sender, receivers, 1)
    assert metrics["weight_update/delta_refused"] == 1.0 and metrics["weight_update/delta"] == 0.0
    assert "everything is sent instead" in caplog.text
    expected = {name: t.contiguous() for name, t in sender.tensors.items()}
    assert all(r.receiver.version == 1 and equal(r.receiver._session.weights, expected) for r in receivers)
    assert sender.aborted == 1
    assert (await updates.update(sender, receivers, 2))["weight_update/delta"] == 1.0


async def test_without_deltas_everything_is_sent_every_time():
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors)]
    updates = WeightUpdater(delta=False)
    for version in range(3):
        await updates.update(sender, receivers, version)
    assert sender.bases == [None, None, None]


async def test_changes_that_do_not_pay_are_followed_by_whole_updates_and_tried_again(caplog):
    caplog.set_level(logging.INFO)
    tensors = weights()
    sender, receivers = LocalSender(tensors, 600), [LocalReceiver(tensors)]
    updates = WeightUpdater(delta=True, pays_below=0.5)
    for version in range(21):
        await updates.update(sender, receivers, version)
        # Everything changes between versions 1 and 2.
        sender.tensors = nudged(sender.tensors, version, share=1.0 if version == 1 else 0.1)
    assert sender.bases == [None, 0, 1] + [None] * 16 + [18, 19]
    assert "the next 16 updates send everything" in caplog.text
    expected = {name: t.contiguous() for name, t in sender.tensors.items()}
    await updates.update(sender, receivers, 21)
    assert equal(receivers[0].receiver._session.weights, expected)


async def test_no_more_buckets_are_in_flight_than_allowed():
    tensors = {f"w{i}": torch.zeros(100) for i in range(12)}
    flying, most = 0, 0

    class Counting(LocalSender):
        async def next_bucket(self):
            nonlocal flying, most
            flying, most = flying + 1, max(most, flying + 1)
            return await super().next_bucket()

    class Slow(LocalReceiver):
        async def load_bucket(self, bucket):
            nonlocal flying
            for _ in range(5):
                await asyncio.sleep(0)
            await super().load_bucket(bucket)
            flying -= 1

    await update_weights(Counting(tensors, 400), [Slow(tensors)], 0, buckets_in_flight=2)
    assert most == 2
