"""Typed calls to Ray actors: plain and async methods, and the errors that reach the caller."""

import asyncio
import os

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
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def group(session):
    group = WorkerGroup(Worker, [{"num_cpus": 0}] * 2, factor=10)
    yield group
    group.stop()


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
