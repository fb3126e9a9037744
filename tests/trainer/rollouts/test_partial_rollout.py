"""Which prompts a step takes, which go on, how old they get, and what a checkpoint must know of them."""

import asyncio
import itertools
import random

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.partial_rollout import CarriedGroups, Position, Prompt, staleness_metrics


def prompts(first=1):
    return (Prompt({"uid": number}, Position(number, 0, number - 1)) for number in itertools.count(first))


class Engine:
    """Answers a prompt when it is told to."""

    def __init__(self):
        self.answers = {}

    async def generate(self, row):
        self.answers[row["uid"]] = asyncio.get_running_loop().create_future()
        return await self.answers[row["uid"]]

    def finish(self, *uids):
        for uid in uids:
            self.answers[uid].set_result(uid)


def groups(engine, needed=2, under_way=4, max_staleness=2):
    return CarriedGroups(engine.generate, needed=needed, under_way=under_way, max_staleness=max_staleness)


async def settle():
    """Let everything run that can run."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_step_takes_what_is_done_and_the_rest_goes_on():
    engine, source = Engine(), prompts()
    carried = groups(engine)
    first = asyncio.ensure_future(carried.take(1, 9, source))
    await settle()
    assert sorted(engine.answers) == [1, 2, 3, 4]
    engine.finish(4)
    await settle()
    assert not first.done()
    engine.finish(2)
    assert await first == [2, 4], "in the order of their draws"
    assert [position.number for position in carried.positions()] == [1, 3]

    second = asyncio.ensure_future(carried.take(2, 8, source))
    await settle()
    assert sorted(engine.answers) == [1, 2, 3, 4, 5, 6], "as many new ones as were taken"
    engine.finish(6, 5, 3)
    assert await second == [3, 5], "what started first"
    await carried.close()
    assert engine.answers[1].cancelled()


async def test_what_is_overdue_is_waited_for():
    engine, source = Engine(), prompts()
    carried = groups(engine, max_staleness=1)
    step = asyncio.ensure_future(carried.take(1, 9, source))
    await settle()
    engine.finish(2, 3)
    await step
    step = asyncio.ensure_future(carried.take(2, 8, source))
    await settle()
    engine.finish(5, 6, 4)
    await settle()
    assert not step.done()
    engine.finish(1)
    assert await step == [1, 4]
    await carried.close()


@pytest.mark.parametrize("seed", range(20))
async def test_no_group_is_older_than_allowed_and_none_is_lost_or_doubled(seed):
    chance = random.Random(seed)
    needed = chance.randint(1, 5)
    under_way, steps, most = chance.randint(needed, 2 * needed), 12, chance.randint(1, 3)
    engine, source = Engine(), prompts()
    carried = groups(engine, needed, under_way, most)
    started, taken = {}, []
    for step in range(1, steps + 1):
        taking = asyncio.ensure_future(carried.take(step, steps - step + 1, source))
        await settle()
        for uid in engine.answers:
            started.setdefault(uid, step)
        while not taking.done():
            engine.finish(chance.choice([uid for uid, answer in engine.answers.items() if not answer.done()]))
            await settle()
        batch = await taking
        assert len(batch) == needed and all(step - started[uid] <= most for uid in batch)
        taken += batch
    # The last steps begin nothing that would be thrown away.
    assert sorted(taken) == list(range(1, needed * steps + 1)) and not carried.positions()


async def test_an_error_of_any_group_ends_the_step():
    engine = Engine()
    carried = groups(engine)
    step = asyncio.ensure_future(carried.take(1, 9, prompts()))
    await settle()
    engine.answers[3].set_exception(RuntimeError("no replica left"))
    with pytest.raises(RuntimeError, match="no replica left"):
        await asyncio.wait_for(step, 60)
    await carried.close()


async def test_another_run_begins_with_what_was_under_way():
    engine, source = Engine(), prompts()
    carried = groups(engine)
    step = asyncio.ensure_future(carried.take(1, 9, source))
    await settle()
    engine.finish(2, 4, 3)
    await step
    left = carried.positions()
    await carried.close()

    # 4 was done but not trained on: it is as much under way as 1.
    assert [position.number for position in left] == [1, 4]
    again = Engine()
    resumed = groups(again)
    resumed.resume([Prompt({"uid": position.number}, position) for position in left])
    assert resumed.positions() == left
    step = asyncio.ensure_future(resumed.take(2, 8, source))
    await settle()
    assert list(again.answers) == [*(position.number for position in left), 5, 6]
    again.finish(5, 6)
    assert await step == [5, 6]
    await resumed.close()


def test_staleness_by_the_oldest_token():
    versions = torch.tensor([[4, 4, 5, -1], [3, -1, 5, 5], [5, 5, 5, 5], [-1, -1, -1, -1]])
    metrics = staleness_metrics(DataProto.from_dict(tensors={"weight_versions": versions}), 5)
    assert metrics == {
        "partial_rollout/staleness/max": 2.0,
        "partial_rollout/staleness/mean": 1.0,
        "partial_rollout/resumed_samples": pytest.approx(2 / 3),
    }
    empty = DataProto.from_dict(tensors={"weight_versions": torch.full((2, 3), -1)})
    assert staleness_metrics(empty, 5) == {}
