"""Partial rollouts: which prompts a step collects, which keep running, their age, and the state in a checkpoint."""

import asyncio
import itertools
import random

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.partial_rollout import CarriedGroups, staleness_metrics
from verl.trainer.rollouts.prompts import Prompt, PromptId


def prompts(first=1):
    return (Prompt({"uid": number}, PromptId(number, 0, number - 1)) for number in itertools.count(first))


class Engine:
    """Finishes the generation for a prompt when the test says so."""

    def __init__(self):
        self.responses = {}

    async def generate(self, row):
        self.responses[row["uid"]] = asyncio.get_running_loop().create_future()
        return await self.responses[row["uid"]]

    def finish(self, *uids):
        for uid in uids:
            self.responses[uid].set_result(uid)


def make_groups(engine, needed=2, in_progress=4, max_staleness=2):
    return CarriedGroups(engine.generate, needed=needed, in_progress=in_progress, max_staleness=max_staleness)


async def run_ready_tasks():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_step_collects_the_finished_groups_and_the_others_keep_running():
    engine, source = Engine(), prompts()
    carried = make_groups(engine)
    first = asyncio.ensure_future(carried.collect(1, 9, source))
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4]
    engine.finish(4)
    await run_ready_tasks()
    assert not first.done()
    engine.finish(2)
    assert await first == [2, 4], "in the order of their draws"
    assert [prompt.number for prompt in carried.prompt_ids()] == [1, 3]

    second = asyncio.ensure_future(carried.collect(2, 8, source))
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6], "as many new groups as were collected"
    engine.finish(6, 5, 3)
    assert await second == [3, 5], "the groups that started first"
    await carried.close()
    assert engine.responses[1].cancelled()


async def test_a_step_waits_for_overdue_groups():
    engine, source = Engine(), prompts()
    carried = make_groups(engine, max_staleness=1)
    step = asyncio.ensure_future(carried.collect(1, 9, source))
    await run_ready_tasks()
    engine.finish(2, 3)
    await step
    step = asyncio.ensure_future(carried.collect(2, 8, source))
    await run_ready_tasks()
    engine.finish(5, 6, 4)
    await run_ready_tasks()
    assert not step.done()
    engine.finish(1)
    assert await step == [1, 4]
    await carried.close()


@pytest.mark.parametrize("seed", range(20))
async def test_no_group_exceeds_the_staleness_and_each_is_collected_once(seed):
    chance = random.Random(seed)
    needed = chance.randint(1, 5)
    in_progress, steps, max_staleness = chance.randint(needed, 2 * needed), 12, chance.randint(1, 3)
    engine, source = Engine(), prompts()
    carried = make_groups(engine, needed, in_progress, max_staleness)
    started, collected = {}, []
    for step in range(1, steps + 1):
        collecting = asyncio.ensure_future(carried.collect(step, steps - step + 1, source))
        await run_ready_tasks()
        for uid in engine.responses:
            started.setdefault(uid, step)
        while not collecting.done():
            engine.finish(chance.choice([uid for uid, response in engine.responses.items() if not response.done()]))
            await run_ready_tasks()
        batch = await collecting
        assert len(batch) == needed and all(step - started[uid] <= max_staleness for uid in batch)
        collected += batch
    # The last steps start no group that would be discarded.
    assert sorted(collected) == list(range(1, needed * steps + 1)) and not carried.prompt_ids()


async def test_an_error_of_any_group_ends_the_step():
    engine = Engine()
    carried = make_groups(engine)
    step = asyncio.ensure_future(carried.collect(1, 9, prompts()))
    await run_ready_tasks()
    engine.responses[3].set_exception(RuntimeError("no replica left"))
    with pytest.raises(RuntimeError, match="no replica left"):
        await asyncio.wait_for(step, 60)
    await carried.close()


async def test_a_resumed_run_starts_with_the_prompts_in_progress():
    engine, source = Engine(), prompts()
    carried = make_groups(engine)
    step = asyncio.ensure_future(carried.collect(1, 9, source))
    await run_ready_tasks()
    engine.finish(2, 4, 3)
    await step
    left = carried.prompt_ids()
    await carried.close()

    # Prompt 4 was finished but not trained on, so it counts as in progress like prompt 1.
    assert [prompt.number for prompt in left] == [1, 4]
    new_engine = Engine()
    resumed = make_groups(new_engine)
    resumed.resume([Prompt({"uid": prompt.number}, prompt) for prompt in left])
    assert resumed.prompt_ids() == left
    step = asyncio.ensure_future(resumed.collect(2, 8, source))
    await run_ready_tasks()
    assert list(new_engine.responses) == [*(prompt.number for prompt in left), 5, 6]
    new_engine.finish(5, 6)
    assert await step == [5, 6]
    await resumed.close()


def test_staleness_is_measured_by_the_oldest_token():
    versions = torch.tensor([[4, 4, 5, -1], [3, -1, 5, 5], [5, 5, 5, 5], [-1, -1, -1, -1]])
    metrics = staleness_metrics(DataProto.from_dict(tensors={"weight_versions": versions}), 5)
    assert metrics == {
        "partial_rollout/staleness/max": 2.0,
        "partial_rollout/staleness/mean": 1.0,
        "partial_rollout/resumed_samples": pytest.approx(2 / 3),
    }
    empty = DataProto.from_dict(tensors={"weight_versions": torch.full((2, 3), -1)})
    assert staleness_metrics(empty, 5) == {}
