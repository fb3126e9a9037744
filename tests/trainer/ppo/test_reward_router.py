"""The server of the reward model's address: each request reaches a living engine, whatever happens to others."""

import asyncio

import aiohttp
import pytest

from verl.trainer.ppo.reward_router import RewardRouter
from verl.workers.rollout.types import ReplicaUnavailable


class Engine:
    """Echoes requests; `open` ends a wait, and a dead one raises."""

    def __init__(self, rank):
        self.rank, self.alive, self.in_flight, self.dies = rank, True, 0, False
        self.requests, self.open = [], asyncio.Event()
        self.open.set()

    async def http_request(self, method, path, headers, body):
        self.in_flight += 1
        try:
            if self.dies:
                self.alive = False
                raise ReplicaUnavailable(f"engine {self.rank} died")
            self.requests.append((method, path, headers, body))
            await self.open.wait()
            return 201, "text/plain; charset=utf-8", f"{self.rank}:".encode() + body
        finally:
            self.in_flight -= 1


class Engines:
    def __init__(self, count, restarts=True):
        self.replicas, self.restarts, self.asked = [Engine(rank) for rank in range(count)], restarts, 0

    @property
    def alive(self):
        return [engine for engine in self.replicas if engine.alive]

    async def restart_dead(self):
        self.asked += 1
        if not self.restarts:
            raise RuntimeError("no device")
        for engine in self.replicas:
            engine.alive, engine.dies = True, False
        return 1


def served(count, use, **options):
    """Run `await use(engines, post)`; `post(body)` returns status and text."""

    async def run():
        router, engines = RewardRouter(), Engines(count, **options)
        try:
            await router.start(engines)
            async with aiohttp.ClientSession() as session:

                async def post(body):
                    url = f"http://{router.address}/v1/chat/completions?x=1"
                    async with session.post(url, data=body, headers={"X-Mine": "1"}) as response:
                        return response.status, await response.text()

                return await asyncio.wait_for(use(engines, post), 60)
        finally:
            await router.stop()

    return asyncio.run(run())


def test_a_request_and_its_response_pass_unchanged():
    async def use(engines, post):
        assert await post(b"\x00body") == (201, "0:\x00body")
        ((method, path, headers, body),) = engines.replicas[0].requests
        assert (method, path, body) == ("POST", "/v1/chat/completions?x=1", b"\x00body")
        assert headers["X-Mine"] == "1" and "Host" not in headers

    served(1, use)


def test_the_address_is_known_before_the_start_and_only_on_this_host():
    async def run():
        router = RewardRouter()
        assert router.address.startswith("127.0.0.1:")
        await router.stop()

    asyncio.run(run())


def test_the_least_busy_engine_gets_the_next_request():
    async def use(engines, post):
        first = engines.replicas[0]
        first.open.clear()
        waiting = asyncio.create_task(post(b"a"))
        while not first.requests:
            await asyncio.sleep(0)
        assert await post(b"b") == (201, "1:b")
        first.open.set()
        assert await waiting == (201, "0:a")

    served(2, use)


def test_a_dead_engine_leaves_its_request_to_another_and_is_restarted():
    async def use(engines, post):
        engines.replicas[0].dies = True
        assert await post(b"a") == (201, "1:a")
        assert len(engines.alive) == 2 and engines.asked == 1

    served(2, use)


def test_the_only_engine_is_restarted_before_the_next_request():
    async def use(engines, post):
        engines.replicas[0].dies = True
        status, text = await post(b"a")
        assert status == 503 and "engine 0 died" in text
        assert await post(b"a") == (201, "0:a")

    served(1, use)


@pytest.mark.parametrize("count", [1, 2])
def test_without_any_engine_the_request_fails(count):
    async def use(engines, post):
        for engine in engines.replicas:
            engine.dies = True
        for _ in range(2):
            status, text = await post(b"a")
            assert status == 503 and "no engine of the reward model responds" in text

    served(count, use, restarts=False)
