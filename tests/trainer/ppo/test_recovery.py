"""Restarts of replicas beside stand-ins for them: which weights they get, which requests wait, and when a run ends."""

import asyncio
import time
from contextlib import asynccontextmanager

import pytest

from verl.config.watchdog import WatchdogConfig
from verl.trainer.ppo.recovery import ReplicaFailed, ReplicaRecovery
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.replica import ReplicaSet
from verl.workers.rollout.types import ReplicaUnavailable, TokenOutput
from verl.workers.weight_sync.manifest import WeightUpdateError


class StubReplica:
    """Serves `version`, which the test's `send` sets; dies on `die`, is silent while `silent`."""

    def __init__(self, rank, start_errors=()):
        self.rank, self.version, self.alive, self.waits_for_weights = rank, None, True, False
        self.on_death, self.in_flight, self.starts, self.silent = None, 0, 1, False
        self.progressed = time.monotonic()
        self.start_errors = list(start_errors)
        self.killed = []

    async def generate(self, prompt_ids, sampling_params, request_id, generated):
        if not self.alive:
            raise ReplicaUnavailable(f"replica {self.rank} is dead")
        return TokenOutput([1], weight_versions=[self.version])

    async def health(self):
        if self.silent:
            await asyncio.Event().wait()

    async def start(self):
        self.starts += 1
        if self.start_errors:
            raise self.start_errors.pop(0)
        self.alive, self.version, self.silent = True, None, False

    async def kill(self, reason):
        self.killed.append(reason)
        self.die(reason)

    def die(self, reason):
        if self.alive:
            self.alive = False
            self.on_death(self, reason)


class Run:
    """Replicas with a recovery, and a trainer whose weights are a number."""

    def __init__(self, count=2, max_restarts=3, shares_memory=False, start_errors=(), **watchdog):
        self.replicas = [StubReplica(rank, start_errors) for rank in range(count)]
        self.pool = ReplicaSet(self.replicas)
        self.client = LLMServerClient(self.pool)
        self.lock = asyncio.Lock()
        self.sent = []
        self.dies_in_update = None
        self.recovery = ReplicaRecovery(
            self.pool,
            max_restarts=max_restarts,
            watchdog=WatchdogConfig(**{"heartbeat_s": 0.01, **watchdog}),
            send=self.send,
            exclusive=self.exclusive,
            shares_memory=shares_memory,
            one_update_per_version=True,
        )

    @asynccontextmanager
    async def exclusive(self):
        async with self.lock:
            yield

    async def send(self, replicas, version, *, restore):
        self.sent.append(([replica.rank for replica in replicas], version, restore))
        await asyncio.sleep(0)
        if self.dies_in_update is not None:
            victim, self.dies_in_update = self.replicas[self.dies_in_update], None
            victim.die("struck in the update")
            for replica in replicas:
                replica.version = "half"
            raise WeightUpdateError(f"replica {victim.rank} died")
        for replica in replicas:
            replica.version = version
        return {}

    async def request(self):
        return (await self.client.generate([1], {})).weight_versions[0]

    async def until(self, condition):
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)


@pytest.fixture
async def make_run():
    runs = []

    def make(*arguments, **keywords):
        runs.append(Run(*arguments, **keywords))
        return runs[-1]

    yield make
    for run in runs:
        await run.recovery.close()


async def test_a_restarted_replica_gets_the_published_version(make_run):
    run = make_run()
    await run.recovery.update(4)
    run.replicas[0].die("killed")
    assert await run.request() == 4, "the other one answers"
    await run.until(lambda: len(run.pool.serving) == 2)
    assert run.sent == [([0, 1], 4, False), ([0], 4, True)]
    assert run.recovery.metrics() == {"reliability/restarts": 1.0}


async def restarted_once_the_weights_changed(make_run):
    """Two replicas at version 4; the trainer's weights have changed, and the first replica was restarted since."""
    run = make_run()
    await run.recovery.update(4)
    run.recovery.on_training()
    run.replicas[0].die("killed")
    await run.until(lambda: run.replicas[0].alive and not run.recovery._recovering)
    return run


async def test_beside_serving_replicas_it_waits_for_the_next_version_once_the_weights_changed(make_run):
    run = await restarted_once_the_weights_changed(make_run)
    assert [replica.rank for replica in run.pool.serving] == [1]
    assert await run.request() == 4
    await run.recovery.update(5)
    assert run.sent[1:] == [([0, 1], 5, False)] and len(run.pool.serving) == 2


async def test_requests_to_the_only_replica_wait_and_get_the_changed_weights_as_the_next_version(make_run):
    run = make_run(1)
    await run.recovery.update(4)
    run.recovery.on_training()
    run.replicas[0].die("killed")
    requests = await asyncio.gather(*(run.request() for _ in range(3)))
    assert requests == [5, 5, 5] and run.sent[1:] == [([0], 5, True)]


async def test_a_waiting_replica_serves_as_soon_as_the_last_other_one_dies(make_run):
    run = await restarted_once_the_weights_changed(make_run)
    run.replicas[1].start = asyncio.Event().wait  # its restart does not end
    run.replicas[1].die("killed too")
    async with asyncio.timeout(20):
        assert await run.request() == 5


@pytest.mark.parametrize("count", [1, 2])
async def test_an_update_in_which_a_replica_dies_is_repeated(make_run, count):
    run = make_run(count)
    await run.recovery.update(4)
    run.dies_in_update = 0
    await run.recovery.update(5)
    assert await run.request() == 5
    await run.until(lambda: len(run.pool.serving) == count)
    assert {replica.version for replica in run.replicas} == {5}


async def test_an_update_that_fails_for_another_reason_is_not_repeated(make_run):
    run = make_run()

    async def send(*arguments, **keywords):
        raise WeightUpdateError("no such tensor")

    run.recovery._send = send
    with pytest.raises(WeightUpdateError, match="no such tensor"):
        await run.recovery.update(1)


async def test_a_silent_replica_is_killed_and_restarted(make_run):
    run = make_run(engine_timeout_s=0.05)
    await run.recovery.update(4)
    run.replicas[1].silent = True
    await run.until(lambda: run.recovery.restarts[1] == 1 and len(run.pool.serving) == 2)
    assert run.replicas[1].killed[0] == "replica 1 did not answer a health call within 0.05 s"
    assert not run.replicas[0].killed and not run.replicas[1].silent


async def test_a_replica_that_finishes_no_request_is_killed_after_all_stacks_are_written(make_run):
    run = make_run(generation_timeout_s=0.2)
    events, (idle, stuck) = [], run.replicas
    await run.recovery.update(1)

    async def write_stacks():
        events.append(list(stuck.killed))

    run.recovery.write_stacks = write_stacks
    stuck.in_flight = 3
    await run.until(lambda: stuck.killed)
    assert "replica 1 is stuck: it finishes none of its requests" in stuck.killed[0]
    assert "trainer.watchdog.generation_timeout_s=0.2" in stuck.killed[0]
    assert events == [[]] and idle.killed == []
    stuck.in_flight = 0
    await run.until(lambda: stuck.alive)


async def test_requests_that_wait_for_an_update_are_not_stuck(make_run):
    run = make_run(count=1, generation_timeout_s=0.2)
    (replica,) = run.replicas
    await run.recovery.update(1)
    sending = asyncio.Event()
    send = run.send

    async def slow(*arguments, **keywords):
        await sending.wait()
        return await send(*arguments, **keywords)

    run.recovery._send = slow
    replica.in_flight = 3
    update = asyncio.ensure_future(run.recovery.update(2))
    await asyncio.sleep(0.5)
    sending.set()
    await update
    replica.in_flight = 0
    assert replica.killed == []


async def test_the_run_ends_with_the_first_error_after_the_last_restart(make_run):
    run = make_run(1, max_restarts=2, start_errors=[ValueError("no memory"), ValueError("no disk")])
    await run.recovery.update(4)
    run.replicas[0].die("the engine's own error")
    request = asyncio.ensure_future(run.request())
    message = "replica 0 died, and was restarted 2 .*max_restarts=2. The first error: the engine's own error.*no disk"
    with pytest.raises(ReplicaFailed, match=message):
        await run.recovery.failure()
    with pytest.raises(ReplicaFailed, match=message):
        await request
    with pytest.raises(ReplicaFailed, match=message):
        await run.recovery.update(5)


async def test_a_replica_that_shares_its_memory_does_not_start_while_the_others_sleep(make_run):
    run = make_run(shares_memory=True)
    await run.recovery.update(4)
    run.pool.asleep = True
    run.replicas[0].die("killed")
    await asyncio.sleep(0.05)
    assert run.recovery.restarts.total() == 0
    await run.recovery.update(5)
    await run.until(lambda: len(run.pool.serving) == 2)
    assert {replica.version for replica in run.replicas} == {5}
