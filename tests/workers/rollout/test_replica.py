"""The calls that a replica sends to its server."""

import asyncio

import pytest

from verl.workers.rollout import replica as replica_module
from verl.workers.rollout.replica import vLLMReplica
from verl.workers.rollout.types import ReplicaUnavailable
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer


async def test_an_update_wakes_the_weights_first_and_the_cache_last():
    """What upstream verl calls `multi_stage_wake_up`: the cache is not in memory together with an update's buckets."""
    replica, calls = object.__new__(vLLMReplica), []

    async def call(method, *arguments):
        calls.append((method.__name__, *arguments))

    replica._call = call
    await replica.begin_update(3)
    await replica.load_bucket("bucket")
    await replica.finish_update("manifest")
    assert calls == [
        ("wake_up", ["weights"]),
        ("begin_update", 3, None),
        ("load_bucket", "bucket"),
        ("wake_up", ["kv_cache"]),
        ("finish_update", "manifest"),
    ]


class Server:
    """The actor of a replica, whose engine loads until the test sets `loaded`."""

    def __init__(self, *_, **__):
        self.loaded, self.calls = asyncio.Event(), []

    async def run(self, function, *_):
        return 77 if function is replica_module._pid_of else None

    async def call(self, method, *_):
        self.calls.append(method.__name__)
        if method is vLLMHttpServer.start:
            await self.loaded.wait()

    def kill(self):
        pass


async def test_calls_of_an_earlier_life_do_not_reach_a_replica_that_is_loading(monkeypatch):
    servers = []
    monkeypatch.setattr(replica_module, "Actor", lambda *_, **__: servers.append(Server()) or servers[-1])
    replica = vLLMReplica(0, {"device": "cpu"}, {}, {})
    for number in range(2):
        starting = asyncio.ensure_future(replica.start())
        await asyncio.sleep(0)
        with pytest.raises(ReplicaUnavailable, match="replica 0 is not running"):
            await replica.begin_update(1)
        with pytest.raises(ReplicaUnavailable, match="replica 0 is not running"):
            await replica.abort_update("the update failed")
        servers[number].loaded.set()
        await starting
        await replica.begin_update(1)
        assert servers[number].calls == ["start", "wake_up", "begin_update"]
        await replica.kill("killed by the test")
