"""Tests of weight updates across nodes: broadcast proxies in separate processes, over gloo; a node is only a name."""

import asyncio
import hashlib
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from verl.single_controller.actor import ActorDied
from verl.workers.weight_sync.driver import update_weights
from verl.workers.weight_sync.manifest import WeightUpdateError
from verl.workers.weight_sync.shm import SegmentReader, SharedSegment
from verl.workers.weight_sync.transports import broadcast_proxy, collective
from verl.workers.weight_sync.transports.base import Node
from verl.workers.weight_sync.transports.broadcast_proxy import BroadcastProxy
from verl.workers.weight_sync.transports.collective import CollectiveTransport

HOME, *REMOTE = (Node(name, "10.0.0.1") for name in ("home", "left", "right"))
SLICE = 1000  # bytes; far below the sizes that are sent, so that slices and their remainder are tested
DEATH_S = 60  # a bound that only a hang exceeds
# Each proxy is forked from a process that has imported torch and done nothing with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([broadcast_proxy.__name__, __name__])


def serve(pipe, segments, staged):
    """Run a proxy: read method names from a pipe and run each in a thread."""
    broadcast_proxy.SLICE_BYTES = SLICE
    proxy, sending = BroadcastProxy("gloo", segments), threading.Lock()
    proxy._staged = staged

    def respond(number, method, arguments):
        try:
            reply = (number, True, getattr(proxy, method)(*arguments))
        except (WeightUpdateError, RuntimeError, OSError) as error:
            reply = (number, False, error if isinstance(error, WeightUpdateError) else RuntimeError(str(error)))
        with sending:
            pipe.send(reply)

    while True:
        threading.Thread(target=respond, args=pipe.recv(), daemon=True).start()


class ProcessProxy:
    """A `ProxyHandle`: a proxy in a process of this host."""

    def __init__(self, segments=2, staged=False):
        self.calls, self.done, self.replies = [], [], {}
        self.before = self.before_death = None
        self.pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(theirs, segments, staged), daemon=True)
        self.process.start()
        theirs.close()

    async def call(self, function, *arguments):
        method, number = function.__name__, len(self.calls)
        self.calls.append(method)
        if self.before is not None:
            self.before(method)
        try:
            self.pipe.send((number, method, arguments))
            while number not in self.replies:
                if self.pipe.poll():
                    replied, worked, result = self.pipe.recv()
                    self.replies[replied] = worked, result
                else:
                    await asyncio.sleep(0.001)
        except (EOFError, OSError) as error:
            if self.before_death is not None:
                await self.before_death()
            raise ActorDied(f"process {self.process.pid} ended") from error
        self.done.append(method)
        worked, result = self.replies.pop(number)
        if not worked:
            raise result
        return result

    def kill(self):
        self.process.kill()
        self.process.join()


class Proxies(dict):
    """Starts proxies, keeps the last one by node, and the nodes of all that were started."""

    def __init__(self):
        self.started, self.staged = [], False

    def __call__(self, node):
        self[node] = ProcessProxy(staged=self.staged)
        self.started.append(node)
        return self[node]


def payload(index, nbytes):
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))


class BytesSender:
    """Sends buckets of given sizes in two alternating segments, with fields that only the receiver uses."""

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
    """Hashes the bytes that it loads from shared memory."""

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
        return {"unused": [], "dtypes": {}}

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


SIZES = [5 * SLICE, 3 * SLICE + 1, 1, 0, 7 * SLICE - 1, SLICE]


@pytest.fixture
def proxies():
    started = Proxies()
    yield started
    for proxy in started.values():
        proxy.kill()


def receivers_on(nodes):
    return [(HashReceiver(), node) for node in nodes]


async def run(transport, sizes, placed, version, base=None):
    sender, receivers = transport.connect(BytesSender(sizes), HOME, placed)
    return await update_weights(sender, receivers, version, base=base)


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True])
async def test_every_byte_arrives_once_on_each_node_in_every_update(proxies, staged):
    """`staged` uses two buffers at either end, as on an accelerator."""
    proxies.staged = staged
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    placed = receivers_on([HOME, *REMOTE, REMOTE[0]])
    for version, base in ((1, None), (2, 1)):
        await run(transport, SIZES, placed, version, base)
        for receiver, _ in placed:
            assert receiver.hashes == expected(SIZES, version)
            assert receiver.committed == version
    assert sorted(map(str, proxies.started)) == sorted(map(str, [HOME, *REMOTE]))
    sent = sum(size > 0 for size in SIZES) * 2
    assert [proxies[node].calls.count("receive") for node in REMOTE] == [sent, sent]
    assert proxies[HOME].calls.count("send") == sent


async def test_all_fields_except_the_segment_pass_through(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    at_home, away = receivers_on([HOME, REMOTE[0]])
    await run(transport, SIZES, [at_home, away], 3, base=2)
    for sent, received in zip(at_home[0].buckets, away[0].buckets, strict=True):
        assert {**sent, "segment": None} == {**received, "segment": None}
        assert received["base"] == 2 and received["chunks"] == [{"name": "w", "count": received["index"]}]
        if sent["nbytes"]:
            assert sent["segment"]["pid"] == os.getpid()
            assert received["segment"]["pid"] == proxies[REMOTE[0]].process.pid


async def test_next_bucket_is_broadcast_while_one_is_loaded(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    [(receiver, node)] = placed = receivers_on([REMOTE[0]])

    async def wait_for_the_next_broadcast(bucket):
        while bucket["index"] == 0 and proxies[node].done.count("receive") < 2:
            await asyncio.sleep(0.001)

    receiver.before_load = wait_for_the_next_broadcast
    await asyncio.wait_for(run(transport, [SLICE] * 3, placed, 1), DEATH_S)
    assert receiver.hashes == expected([SLICE] * 3, 1)


async def test_replicas_on_the_trainer_node_need_no_proxy(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    [(receiver, _)] = placed = receivers_on([HOME])
    await run(transport, SIZES, placed, 1)
    assert receiver.hashes == expected(SIZES, 1)
    assert not proxies


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "stopped"])
@pytest.mark.parametrize("when", ["receive", "ready"])
async def test_lost_proxy_is_named_and_replaced(proxies, monkeypatch, how, when):
    """It is lost during a broadcast, or between two updates."""
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    placed = receivers_on([HOME, *REMOTE])
    await run(transport, SIZES, placed, 1)
    victim = proxies[REMOTE[1]].process
    first = dict(proxies)
    transport._timeout_s = DEATH_S if how == "killed" else 2

    def lose(method):
        if method == when and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
            if how == "killed":
                victim.join()

    async def wait_until_a_survivor_failed():
        while first[HOME].calls.count("send") > first[HOME].done.count("send"):
            await asyncio.sleep(0.001)

    proxies[REMOTE[1]].before = lose
    proxies[REMOTE[1]].before_death = wait_until_a_survivor_failed
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
    assert all(not proxy.process.is_alive() for proxy in first.values())


async def test_node_without_a_running_proxy_is_named(proxies):
    def start(node):
        proxy = proxies(node)
        if node == REMOTE[0]:
            proxy.kill()
        return proxy

    transport = CollectiveTransport(start, timeout_s=DEATH_S)
    with pytest.raises(WeightUpdateError, match=r"node 10\.0\.0\.1 \(left\): process \d+ ended"):
        await run(transport, SIZES, receivers_on(REMOTE), 1)
    assert all(not proxy.process.is_alive() for proxy in proxies.values())


async def test_update_that_fails_while_the_proxies_join_leaves_a_working_transport(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    [(receiver, node)] = placed = receivers_on([REMOTE[0]])
    begin = receiver.begin_update

    async def refuse(version, base):
        while node not in proxies or "join" not in proxies[node].calls:
            await asyncio.sleep(0.001)
        raise WeightUpdateError("out of memory")

    receiver.begin_update = refuse
    with pytest.raises(WeightUpdateError, match="out of memory"):
        await run(transport, SIZES, placed, 1)
    receiver.begin_update = begin
    await run(transport, SIZES, placed, 2)
    assert receiver.hashes == expected(SIZES, 2)


async def test_error_of_a_replica_keeps_the_proxies(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
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
    assert len(proxies.started) == 2


class LostSender(BytesSender):
    async def next_bucket(self):
        bucket = await super().next_bucket()
        return {**bucket, "segment": {**bucket["segment"], "fd": 1 << 20}}


async def test_missing_segment_is_an_error_of_the_home_proxy(proxies, monkeypatch):
    monkeypatch.setattr(collective, "_GRACE_S", 1.0)
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    sender, receivers = transport.connect(LostSender([SLICE]), HOME, receivers_on([REMOTE[0]]))
    with pytest.raises(WeightUpdateError, match=r"\(home\): WeightUpdateError: .* process \d+ cannot be opened"):
        await update_weights(sender, receivers, 1)


async def test_transport_follows_the_nodes_of_the_replicas(proxies):
    transport = CollectiveTransport(proxies, timeout_s=DEATH_S)
    for version, nodes in enumerate(([REMOTE[0]], REMOTE, [REMOTE[1]], [HOME]), start=1):
        placed = receivers_on(nodes)
        await run(transport, SIZES, placed, version)
        assert all(receiver.hashes == expected(SIZES, version) for receiver, _ in placed)
        running = {node for node, proxy in proxies.items() if proxy.process.is_alive()}
        assert running == (set() if nodes == [HOME] else {HOME, *nodes})
