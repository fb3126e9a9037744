"""Typed calls to Ray actors: plain and async methods, and the errors that reach the caller."""

import asyncio
import contextvars
import os
import time

import pytest
import ray

from verl.single_controller.actor import Actor, ActorDied
from verl.single_controller.worker_group import WorkerGroup

pytestmark = pytest.mark.e2e


class Worker:
    def __init__(self, rank, *, factor):
        self.rank, self.factor = rank, factor

    def product(self, value, offset=0):
        return self.rank, value * self.factor + offset

    def fail_on(self, rank):
        if rank == self.rank:
            raise KeyError(f"rank {rank}")

    def wait_for_file(self, path):
        while not os.path.exists(path):
            time.sleep(0.01)

    def exit(self):
        os._exit(3)


class AsyncWorker:
    async def double(self, value):
        await asyncio.sleep(0)
        return 2 * value


def worker_rank(worker):
    return worker.rank


@pytest.fixture(scope="module")
def session():
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def group(session):
    group = WorkerGroup(Worker, [{"num_cpus": 0}] * 2, factor=10)
    yield group
    group.stop()


@pytest.mark.slow
async def test_a_group_returns_results_by_rank(group):
    assert len(group) == 2
    assert await group.all(Worker.product, 3, offset=1) == [(0, 31), (1, 31)]
    assert await group.each(Worker.product, [(1,), (2, 5)]) == [(0, 10), (1, 25)]
    assert await group.rank(1, Worker.product, 4) == (1, 40)
    assert await group.run(worker_rank) == [0, 1]


async def test_a_group_raises_the_worker_s_own_exception(group):
    with pytest.raises(KeyError, match="rank 1") as raised:
        await group.all(Worker.fail_on, 1)
    assert type(raised.value) is KeyError


async def test_a_process_that_ends_raises_actor_died(group):
    with pytest.raises(ActorDied, match="Worker process died"):
        await group.rank(0, Worker.exit)


async def test_an_actor_runs_async_methods(session):
    actor = Actor(AsyncWorker, {"num_cpus": 0})
    assert await actor.call(AsyncWorker.double, 21) == 42
    actor.kill()


async def test_calls_of_other_tasks_wait_until_an_exclusive_block_ends(group):
    order = []

    async def call(name):
        await group.all(Worker.product, 1)
        order.append(name)

    async with group.exclusive():
        outside = asyncio.create_task(call("other"), context=contextvars.Context())
        await asyncio.create_task(call("inner"))
        await call("block")
        assert not outside.done()
    await outside
    assert order == ["inner", "block", "other"]


@pytest.mark.slow
async def test_a_call_that_exceeds_its_limit_is_reported_with_the_ranks_that_it_waits_for(group):
    reports, reported = [], asyncio.Event()

    def on_overdue(report):
        reports.append(report)
        reported.set()

    await group.all(Worker.product, 1)  # both processes run
    group.limit_calls(3, on_overdue)
    waiting = asyncio.ensure_future(group.each(Worker.wait_for_file, [("/",), ("/no such file",)]))
    await reported.wait()
    assert reports == ["wait_for_file has not ended after 3 s on trainer rank(s) 1"]
    assert not waiting.done(), "the report does not end the call"
    waiting.cancel()
