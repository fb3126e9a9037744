"""Requests over few calls, between a client and a server in one process; their messages are pickled."""

import asyncio
import pickle

import pytest

from verl.workers.rollout.request_channel import RequestChannel, RequestDesk
from verl.workers.rollout.types import ReplicaUnavailable


class Refused(ValueError):
    """Like pydantic's: pickles, but does not unpickle."""

    def __init__(self, field, value):
        super().__init__(f"{field}={value}")


class Line:
    """Counts calls. `dead` ends all calls, including waiting ones, like a dead actor."""

    def __init__(self, answer):
        self.desk = RequestDesk(answer, (ReplicaUnavailable, ValueError))
        self.channel = RequestChannel(self.submit, self.next_responses)
        self.taken, self.brought = [], []
        self.dead = asyncio.Event()

    async def submit(self, requests):
        if self.dead.is_set():
            raise ReplicaUnavailable("dead")
        self.taken.append(len(requests))
        self.desk.submit(pickle.loads(pickle.dumps(requests)))

    async def next_responses(self):
        some, dead = asyncio.ensure_future(self.desk.next_responses()), asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([some, dead], return_when=asyncio.FIRST_COMPLETED)
        if self.dead.is_set():
            some.cancel()
            raise ReplicaUnavailable("dead")
        dead.cancel()
        self.brought.append(len(some.result()))
        return pickle.loads(pickle.dumps(some.result()))


async def test_each_request_gets_its_response_in_any_order():
    gates = [asyncio.Event() for _ in range(4)]

    async def answer(i, word):
        await gates[i].wait()
        return word * i

    line = Line(answer)
    asked = [asyncio.create_task(line.channel.request(i, "ab")) for i in range(4)]
    for i in (2, 0, 3, 1):
        gates[i].set()
        assert await asked[i] == "ab" * i
    assert line.taken == [4]
    assert await line.channel.request(3, "c") == "ccc", "after a pause"


async def test_a_hundred_requests_of_one_turn_take_few_calls():
    async def answer(i):
        return i * i

    line = Line(answer)
    assert await asyncio.gather(*(line.channel.request(i) for i in range(100))) == [i * i for i in range(100)]
    assert line.taken == [100] and len(line.brought) <= 2


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (ReplicaUnavailable("serves nothing"), ReplicaUnavailable, "serves nothing"),
        (Refused("top_p", 7), ValueError, "top_p=7"),
        (KeyError("x"), RuntimeError, "KeyError: 'x'"),
    ],
)
async def test_an_error_reaches_only_its_request(raised, kind, text):
    async def answer(good):
        if not good:
            raise raised
        return "fine"

    line = Line(answer)
    bad, good = await asyncio.gather(line.channel.request(False), line.channel.request(True), return_exceptions=True)
    assert (type(bad), str(bad), good) == (kind, text, "fine")


async def test_a_dead_process_fails_waiting_and_later_requests():
    async def answer():
        await asyncio.Event().wait()

    line = Line(answer)
    asked = [asyncio.create_task(line.channel.request()) for _ in range(3)]
    while not line.taken:
        await asyncio.sleep(0)
    line.dead.set()
    outcomes = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
    assert [type(outcome) for outcome in outcomes] == [ReplicaUnavailable] * 3
    with pytest.raises(ReplicaUnavailable, match="dead"):
        await asyncio.wait_for(line.channel.request(), 10)


async def test_a_response_to_a_cancelled_request_is_dropped():
    gate = asyncio.Event()

    async def answer(word):
        await gate.wait()
        return word

    line = Line(answer)
    gone, stays = (asyncio.create_task(line.channel.request(word)) for word in ("gone", "stays"))
    while not line.taken:
        await asyncio.sleep(0)
    gone.cancel()
    gate.set()
    assert await stays == "stays"
    assert gone.cancelled()
