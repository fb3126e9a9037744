"""Weight updates across nodes: relays as processes of their own, over gloo; a node is a name here."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment
from verl.workers.weight_sync.transports import broadcast_proxy, collective
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.broadcast_proxy import BroadcastProxy
from verl.workers.weight_sync.transports.collective import BroadcastProxyDied, CollectiveTransport
from verl.workers.weight_sync.transports.create import backend_on
from verl.workers.weight_sync.transports.shared_memory import SharedMemoryTransport

HOME, *REMOTE = (Node(name, "10.0.0.1") for name in ("home", "left", "right"))
PIECE = 1000  # bytes; far below what is sent, so that pieces and their tail are tried
DEATH_S = 60  # a bound that only a hang exceeds
# Each relay is forked from a process that has imported torch and done nothing with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([broadcast_proxy.__name__, __name__])


def serve(pipe, segments, staged):
    """A relay's process: methods by name through a pipe, each in a thread."""
    broadcast_proxy.SLICE_BYTES = PIECE
    relay, answering = BroadcastProxy("gloo", segments), threading.Lock()
    relay._staged = staged

    def answer(number, method, arguments):
        try:
            reply = (number, True, getattr(relay, method)(*arguments))
        except (WeightUpdateError, RuntimeError, OSError) as error:
            reply = (number, False, error if isinstance(error, WeightUpdateError) else RuntimeError(str(error)))
        with answering:
            pipe.send(reply)

    while True:
        threading.Thread(target=answer, args=pipe.recv(), daemon=True).start()


class ProcessRelay:
    """A relay in a process of this host."""

    def __init__(self, segments=2, staged=False):
        self.calls, self.done, self.replies = [], [], {}
        self.before = self.before_death = None
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, segments, staged), daemon=True)
        self.process.start()
        theirs.close()

    async def call(self, method, *arguments):
        number = len(self.calls)
        self.calls.append(method)
        if self.before is not None:
            self.before(method)
        try:
            self.pipe.send((number, method, arguments))
            while number not in self.replies:
                if self.pipe.poll():
                    answered, worked, result = self.pipe.recv()
                    self.replies[answered] = worked, result
                else:
                    await asyncio.sleep(0.001)
        except (EOFError, OSError) as error:
            if self.before_death is not None:
                await self.before_death()
            raise BroadcastProxyDied(f"process {self.process.pid} ended") from error
        self.done.append(method)
        worked, result = self.replies.pop(number)
        if not worked:
            raise result
        return result

    def end(self):
        self.process.kill()
        self.process.join()


class Relays(dict):
    """Starts them, by node, and keeps all that were ever started."""

    def __init__(self):
        self.started, self.staged = [], False

    def __call__(self, node):
        self[node] = ProcessRelay(staged=self.staged)
        self.started.append(node)
        return self[node]


def payload(index, nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


class BytesSender:
    """Buckets of given sizes in two alternating segments, with keys that only the receiver understands."""

    def __init__(self, sizes):
        self.sizes, self.aborts = sizes, 0
        self.segments = [SharedSegment(max(sizes) or 1) for _ in range(2)]

    async def begin_export(self, version, base):
        self.version, self.base, self.index = version, base, 0

    async def next_bucket(self):
        index, self.index = self.index, self.index + 1
        nbytes, segment = self.sizes[index], self.segments[index % 2]
        segment.bytes[:nbytes] = payload(self.version * 100 + index, nbytes)
        return {
            "version": self.version,
            "index": index,
            "last": self.index == len(self.sizes),
            "nbytes": nbytes,
            "segment": segment.handle if nbytes else None,
            "entries": [{"name": "w", "offset": index}],
            "base": self.base,
            "chunks": [{"name": "w", "count": index}],
        }

    async def finish_export(self):
        manifest = {"version": self.version, "num_buckets": self.index}
        return {"manifest": manifest, "seconds": 0.0, "encode": 0.0, "errors": {}, "full_bytes": sum(self.sizes)}

    async def abort_export(self):
        self.aborts += 1


class HashReceiver:
    """Hashes what it loads out of shared memory."""

    def __init__(self):
        self.reader, self.committed, self.reason = SegmentReader(), None, None
        self.before_load = None

    async def begin_update(self, version, base):
        self.buckets, self.hashes = [], []

    async def load_bucket(self, bucket):
        if self.before_load is not None:
            await self.before_load(bucket)
        nbytes = bucket["nbytes"]
        memory = self.reader.open(bucket["segment"])[:nbytes].numpy().tobytes() if nbytes else b""
        self.hashes.append(hashlib.sha256(memory).hexdigest())
        self.buckets.append(bucket)

    async def finish_update(self, manifest):
        assert manifest["num_buckets"] == len(self.buckets)
        self.committed, self.reason = manifest["version"], None
        return {"encode": 0.0, "load": 0.0, "finish": 0.0, "bytes": 0, "errors": {}, "accepts_delta": True}

    async def abort_update(self, reason):
        self.committed, self.reason = None, reason

    async def parameter_hashes(self):
        return [{"w": self.hashes[-1]}]


def expected(sizes, version):
    return [
        hashlib.sha256(payload(version * 100 + index, nbytes).numpy().tobytes()).hexdigest()
        for index, nbytes in enumerate(sizes)
    ]


SIZES = [5 * PIECE, 3 * PIECE + 1, 1, 0, 7 * PIECE - 1, PIECE]


@pytest.fixture
def relays():
    started = Relays()
    yield started
    for relay in started.values():
        relay.end()


def receivers_on(nodes):
    return [(HashReceiver(), node) for node in nodes]


async def run(transport, sizes, placed, version, base=None):
    sender, receivers = transport.connect(BytesSender(sizes), HOME, placed)
    return await update_weights(sender, receivers, version, base=base)


@pytest.mark.parametrize("staged", [False, True])
async def test_every_byte_arrives_once_on_each_node_and_again_at_the_next_update(relays, staged):
    """Staged as on an accelerator: through two buffers at either end."""
    relays.staged = staged
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    placed = receivers_on([HOME, *REMOTE, REMOTE[0]])
    for version, base in ((1, None), (2, 1)):
        await run(transport, SIZES, placed, version, base)
        for receiver, _ in placed:
            assert receiver.hashes == expected(SIZES, version)
            assert receiver.committed == version
    assert sorted(map(str, relays.started)) == sorted(map(str, [HOME, *REMOTE]))
    sent = sum(size > 0 for size in SIZES) * 2
    assert [relays[node].calls.count("receive") for node in REMOTE] == [sent, sent]
    assert relays[HOME].calls.count("send") == sent


async def test_all_but_the_segment_is_passed_through(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    at_home, away = receivers_on([HOME, REMOTE[0]])
    await run(transport, SIZES, [at_home, away], 3, base=2)
    for sent, received in zip(at_home[0].buckets, away[0].buckets, strict=True):
        assert {**sent, "segment": None} == {**received, "segment": None}
        assert received["base"] == 2 and received["chunks"] == [{"name": "w", "count": received["index"]}]
        if sent["nbytes"]:
            assert sent["segment"]["pid"] == os.getpid()
            assert received["segment"]["pid"] == relays[REMOTE[0]].process.pid


async def test_the_next_bucket_travels_while_one_is_loaded(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    [(receiver, node)] = placed = receivers_on([REMOTE[0]])

    async def until_the_next_travelled(bucket):
        while bucket["index"] == 0 and relays[node].done.count("receive") < 2:
            await asyncio.sleep(0.001)

    receiver.before_load = until_the_next_travelled
    await asyncio.wait_for(run(transport, [PIECE] * 3, placed, 1), DEATH_S)
    assert receiver.hashes == expected([PIECE] * 3, 1)


async def test_replicas_at_home_need_no_relay(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    [(receiver, _)] = placed = receivers_on([HOME])
    await run(transport, SIZES, placed, 1)
    assert receiver.hashes == expected(SIZES, 1)
    assert not relays


@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("when", ["receive", "ready"])
async def test_a_lost_peer_is_named_and_replaced(relays, monkeypatch, how, when):
    """In the middle of a broadcast, or between two updates."""
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    placed = receivers_on([HOME, *REMOTE])
    await run(transport, SIZES, placed, 1)
    victim = relays[REMOTE[1]].process
    first = dict(relays)
    transport._timeout_s = DEATH_S if how == "killed" else 2

    def lose(method):
        if method == when and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            if how == "killed":
                victim.join()

    async def until_a_survivor_failed():
        while first[HOME].calls.count("send") > first[HOME].done.count("send"):
            await asyncio.sleep(0.001)

    relays[REMOTE[1]].before = lose
    relays[REMOTE[1]].before_death = until_a_survivor_failed
    if when == "ready":
        monkeypatch.setattr(collective, "_GRACE_S", 1.0)
    started = time.monotonic()
    if when == "receive":
        with pytest.raises(WeightUpdateError, match=r"10\.0\.0\.1 \(right\)") as caught:
            await run(transport, SIZES, placed, 2)
        assert "(home)" not in str(caught.value) and "(left)" not in str(caught.value)
        assert all(receiver.committed is None and "right" in receiver.reason for receiver, _ in placed)
    transport._timeout_s = DEATH_S
    await run(transport, SIZES, placed, 3)
    assert time.monotonic() - started < DEATH_S
    assert all(receiver.hashes == expected(SIZES, 3) and receiver.committed == 3 for receiver, _ in placed)
    assert all(not relay.process.is_alive() for relay in first.values())


async def test_a_node_that_takes_no_relay_is_named(relays):
    def start(node):
        relay = relays(node)
        if node == REMOTE[0]:
            relay.end()
        return relay

    transport = CollectiveTransport(start, timeout_s=DEATH_S)
    with pytest.raises(WeightUpdateError, match=r"node 10\.0\.0\.1 \(left\): process \d+ ended"):
        await run(transport, SIZES, receivers_on(REMOTE), 1)
    assert all(not relay.process.is_alive() for relay in relays.values())


async def test_an_update_that_fails_while_the_relays_meet(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    [(receiver, node)] = placed = receivers_on([REMOTE[0]])
    begin = receiver.begin_update

    async def refuse(version, base):
        while node not in relays or "join" not in relays[node].calls:
            await asyncio.sleep(0.001)
        raise WeightUpdateError("out of memory")

    receiver.begin_update = refuse
    with pytest.raises(WeightUpdateError, match="out of memory"):
        await run(transport, SIZES, placed, 1)
    receiver.begin_update = begin
    await run(transport, SIZES, placed, 2)
    assert receiver.hashes == expected(SIZES, 2)


async def test_an_error_of_one_replica_leaves_the_relays(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    [(receiver, _)] = placed = receivers_on([REMOTE[0]])

    async def refuse(bucket):
        if bucket["index"] == 1:
            raise WeightUpdateError("parameter 'w' is not known")

    receiver.before_load = refuse
    with pytest.raises(WeightUpdateError, match="'w' is not known"):
        await run(transport, SIZES, placed, 1)
    receiver.before_load = None
    await run(transport, SIZES, placed, 2)
    assert receiver.hashes == expected(SIZES, 2)
    assert len(relays.started) == 2


class LostSender(BytesSender):
    async def next_bucket(self):
        bucket = await super().next_bucket()
        return {**bucket, "segment": {**bucket["segment"], "fd": 1 << 20}}


async def test_a_segment_that_is_gone_is_the_home_relay_s_error(relays, monkeypatch):
    monkeypatch.setattr(collective, "_GRACE_S", 1.0)
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    sender, receivers = transport.connect(LostSender([PIECE]), HOME, receivers_on([REMOTE[0]]))
    with pytest.raises(WeightUpdateError, match=r"\(home\): WeightUpdateError: .* process \d+ cannot be opened"):
        await update_weights(sender, receivers, 1)


async def test_replicas_on_other_nodes_join_and_leave(relays):
    transport = CollectiveTransport(relays, timeout_s=DEATH_S)
    for version, nodes in enumerate(([REMOTE[0]], REMOTE, [REMOTE[1]], [HOME]), start=1):
        placed = receivers_on(nodes)
        await run(transport, SIZES, placed, version)
        assert all(receiver.hashes == expected(SIZES, version) for receiver, _ in placed)
        running = {node for node, relay in relays.items() if relay.process.is_alive()}
        assert running == (set() if nodes == [HOME] else {HOME, *nodes})


async def test_without_a_transport_a_remote_replica_is_refused():
    sender, (local, remote) = BytesSender(SIZES), receivers_on([HOME, REMOTE[0]])
    assert SharedMemoryTransport().connect(sender, HOME, [local]) == (sender, [local[0]])
    with pytest.raises(WeightUpdateError, match=r"backend=naive.*\(home\).*\(left\).*use nccl, hccl or gloo"):
        SharedMemoryTransport().connect(sender, HOME, [local, remote])


@pytest.mark.parametrize(
    ("device", "backend", "meant"),
    [("npu", "nccl", "hccl"), ("npu", "hccl", "hccl"), ("npu", "gloo", "gloo"), ("cuda", "nccl", "nccl")],
)
def test_what_a_backend_means_on_a_device(device, backend, meant):
    assert backend_on(device, backend) == meant
