"""Partial rollouts: which prompts a step collects, which keep running, their age, and the state in a checkpoint."""

import asyncio
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import GenerationTimes, ScoredSample
from verl.config import PPOConfig
from verl.config.stream import Stream, complete, resolve_stream
from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses
from verl.trainer.rollouts.partial_rollout import CarriedGroups, staleness_metrics
from verl.trainer.rollouts.pipeline import rollout_pipeline
from verl.trainer.rollouts.prompts import Prompt, PromptId, PromptSource
from verl.trainer.rollouts.sampling import RolloutSampler
from verl.utils.dataset.loader import build_dataloader
from verl.workers.reward import RewardResult


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


def make_groups(engine, source, needed=2, in_progress=4, max_staleness=2, at_once=99, total_steps=9, **stream):
    """Groups of partial rollouts: one local update in a step, no limit of prompts at once."""
    options = {"updates": 1, "drain": False, **stream}
    flow = Stream(prompts=needed, in_progress=in_progress, at_once=None, max_staleness=max_staleness, **options)
    return CarriedGroups(engine.generate, source, flow, at_once=at_once, total_steps=total_steps)


async def run_ready_tasks():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_step_collects_the_finished_groups_and_the_others_keep_running():
    engine = Engine()
    carried = make_groups(engine, prompts())
    first = asyncio.ensure_future(carried.collect(1))
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4]
    engine.finish(4)
    await run_ready_tasks()
    assert not first.done()
    engine.finish(2)
    assert await first == [2, 4], "in the order of their draws"
    assert [prompt.number for prompt in carried.prompt_ids()] == [1, 3]

    second = asyncio.ensure_future(carried.collect(2))
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6], "as many new groups as were collected"
    engine.finish(6, 5, 3)
    assert await second == [3, 5], "the groups that started first"
    await carried.close()
    assert engine.responses[1].cancelled()


async def test_a_step_waits_for_overdue_groups():
    engine = Engine()
    carried = make_groups(engine, prompts(), max_staleness=1)
    step = asyncio.ensure_future(carried.collect(1))
    await run_ready_tasks()
    engine.finish(2, 3)
    await step
    step = asyncio.ensure_future(carried.collect(2))
    await run_ready_tasks()
    engine.finish(5, 6, 4)
    await run_ready_tasks()
    assert not step.done()
    engine.finish(1)
    assert await step == [1, 4]
    await carried.close()


async def test_a_local_update_waits_only_if_the_later_ones_of_the_step_have_no_place():
    engine = Engine()
    carried = make_groups(engine, prompts(), needed=1, updates=2, in_progress=3, max_staleness=1)
    await carried_over(carried, engine, 1, finish=(2, 3))
    # Prompt 1 is overdue in step 2: the first local update trains on another one, the second waits for it.
    carried.begin_step(2)
    await run_ready_tasks()
    engine.finish(4)
    assert await carried.collect(2) == [4]
    engine.finish(5)
    last = asyncio.ensure_future(carried.collect(2))
    await run_ready_tasks()
    assert not last.done()
    engine.finish(1)
    assert await last == [1]
    await carried.close()


async def carried_over(carried, engine, step, finish):
    """Collect a step whose prompts `finish` finish."""
    carried.begin_step(step)
    await run_ready_tasks()
    engine.finish(*finish)
    for uid in finish:
        assert await carried.collect(step) == [uid]


async def test_a_prompt_starts_when_another_one_finishes_until_the_staleness_is_reached():
    engine = Engine()
    carried = make_groups(engine, prompts(), needed=2, updates=2, in_progress=6, max_staleness=1, at_once=2)
    carried.begin_step(1)
    await run_ready_tasks()
    for number in range(1, 7):
        assert sorted(engine.responses) == list(range(1, min(number + 2, 7)))
        engine.finish(number)
        await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6], "the replicas wait for the trainer"
    assert await carried.collect(1) == [1, 2]
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6], "a local update brings no new weights"
    assert await carried.collect(1) == [3, 4]
    assert await carried.pause() > 0, "seconds without a prompt"
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6]
    carried.begin_step(2)
    await run_ready_tasks()
    assert sorted(engine.responses) == [1, 2, 3, 4, 5, 6, 7, 8]
    await carried.close()


@pytest.mark.parametrize("drain", [True, False])
async def test_new_weights_wait_for_the_prompts_in_progress_only_without_partial_rollouts(drain):
    engine = Engine()
    carried = make_groups(engine, prompts(), at_once=3, drain=drain)
    carried.begin_step(1)
    await run_ready_tasks()
    engine.finish(1, 2)
    assert await carried.collect(1) == [1, 2]
    pause = asyncio.ensure_future(carried.pause())
    await run_ready_tasks()
    assert pause.done() != drain and sorted(engine.responses) == [1, 2, 3, 4]
    engine.finish(3, 4)
    assert await pause >= 0
    assert sorted(engine.responses) == [1, 2, 3, 4], "no prompt starts before the new weights"
    await carried.close()


@pytest.mark.parametrize("seed", range(20))
async def test_no_group_exceeds_the_staleness_and_each_is_collected_once(seed):
    chance = random.Random(seed)
    needed, updates, steps, max_staleness = (chance.randint(1, high) for high in (5, 3, 12, 3))
    in_progress = chance.randint(needed * updates, (1 + max_staleness) * needed * updates)
    engine = Engine()
    options = {"updates": updates, "at_once": chance.randint(1, in_progress), "total_steps": steps}
    carried = make_groups(engine, prompts(), needed, in_progress, max_staleness, **options)
    started, collected = {}, []
    for step, _ in itertools.product(range(1, steps + 1), range(updates)):
        collecting = asyncio.ensure_future(carried.collect(step))
        await run_ready_tasks()
        while not collecting.done():
            for uid in engine.responses:
                started.setdefault(uid, step)
            engine.finish(chance.choice([uid for uid, response in engine.responses.items() if not response.done()]))
            await run_ready_tasks()
        for uid in engine.responses:
            started.setdefault(uid, step)
        batch = await collecting
        assert len(batch) == needed and all(step - started[uid] <= max_staleness for uid in batch)
        collected += batch
    # The last steps start no group that would be discarded.
    assert sorted(collected) == list(range(1, needed * updates * steps + 1)) and not carried.prompt_ids()


async def test_an_error_of_any_group_ends_the_step():
    engine = Engine()
    carried = make_groups(engine, prompts())
    step = asyncio.ensure_future(carried.collect(1))
    await run_ready_tasks()
    engine.responses[3].set_exception(RuntimeError("no replica left"))
    with pytest.raises(RuntimeError, match="no replica left"):
        await asyncio.wait_for(step, 60)
    await carried.close()


async def test_an_error_in_reading_a_prompt_during_training_ends_the_next_step():
    def broken():
        yield from itertools.islice(prompts(), 2)
        raise ValueError("row 3 is damaged")

    engine = Engine()
    carried = make_groups(engine, broken(), needed=1, in_progress=3, at_once=2)
    carried.begin_step(1)
    await run_ready_tasks()
    engine.finish(1)
    await run_ready_tasks()
    with pytest.raises(ValueError, match="row 3 is damaged"):
        await asyncio.wait_for(carried.collect(1), 60)
    await carried.close()


async def test_a_resumed_run_starts_with_the_prompts_in_progress():
    engine, source = Engine(), prompts()
    carried = make_groups(engine, source)
    step = asyncio.ensure_future(carried.collect(1))
    await run_ready_tasks()
    engine.finish(2, 4, 3)
    await step
    left = carried.prompt_ids()
    await carried.close()

    # Prompt 4 was finished but not trained on, so it counts as in progress like prompt 1.
    assert [prompt.number for prompt in left] == [1, 4]
    new_engine = Engine()
    resumed = make_groups(new_engine, source)
    resumed.resume([Prompt({"uid": prompt.number}, prompt) for prompt in left])
    assert resumed.prompt_ids() == left
    step = asyncio.ensure_future(resumed.collect(2))
    await run_ready_tasks()
    assert list(new_engine.responses) == [*(prompt.number for prompt in left), 5, 6]
    new_engine.finish(5, 6)
    assert await step == [5, 6]
    await resumed.close()


# ---- a whole run without processes: prompts, sampler and pipeline are those of a real one ----


class Rows(Dataset):
    def __len__(self):
        return 11

    def __getitem__(self, i):
        return {"prompt_token_ids": [i + 1], "raw_prompt": "", "data_source": "d", "reward_model": {}}


def random_config(chance):
    """A fully asynchronous config with random sizes, and the length of its run in `total_training_steps`."""
    config = PPOConfig()
    rollout, options = config.actor_rollout_ref.rollout, config.async_training
    options.enable, options.partial_rollout = True, chance.random() < 0.7
    options.staleness_threshold = chance.choice([0, 0.1, 0.5, 0.75, 1, 1.5, 2.5])
    options.trigger_parameter_sync_step, options.require_batches = chance.randint(1, 3), chance.randint(1, 2)
    options.concurrent_samples_per_replica = chance.randint(1, 4)
    config.actor_rollout_ref.actor.ppo_mini_batch_size = chance.randint(1, 2)
    config.algorithm.rollout_correction.bypass_mode = chance.random() < 0.8
    rollout.nnodes, rollout.n_gpus_per_node, rollout.tensor_model_parallel_size = 1, chance.randint(1, 2), 1
    rollout.n, config.trainer.total_training_steps = 2, chance.randint(3, 7)
    assert complete(config) == {}
    return config


class AsyncRun:
    """A trainer and a generator that run at the same time, each for a random number of turns.

    Attributes:
        trained: uid of the prompts of each finished step.
        checkpoint: step, loader state and prompts in progress after the last finished step.
    """

    def __init__(self, config, chance, checkpoint=None):
        self.config, self.chance = config, chance
        self.stream, self.last_step = resolve_stream(config), config.trainer.total_training_steps
        self.source = PromptSource(build_dataloader(Rows(), batch_size=1, shuffle=True, seed=1, drop_last=True))
        self.served = self.trained_version = 0
        self.running, self.most_running, self.ahead, self.trained = set(), 0, 0, {}
        self.checkpoint = checkpoint
        self.sampler = RolloutSampler(
            config,
            self,
            self.source,
            SimpleNamespace(scorer="a scorer"),
            tokenizer=SimpleNamespace(pad_token_id=0),
            sleep=self.turns,
            with_baselines=False,
            total_steps=self.last_step,
        )
        if checkpoint is not None:
            self.served, state, carried = checkpoint
            self.source.restore(state)
            self.sampler.resume_prompts(carried)

    async def turns(self, most=0):
        for _ in range(self.chance.randint(0, most)):
            await asyncio.sleep(0)

    async def generate(self, rows, sampling):
        """Generate the samples of a prompt, one token in a turn; the weights may change between two tokens."""
        uid = rows[0]["uid"]
        self.running.add(uid)
        self.ahead += 1
        self.most_running = max(self.most_running, len(self.running))
        versions = []
        for _ in range(self.chance.choice([1, 2, 3, 40])):
            versions.append(self.served)
            await asyncio.sleep(0)
        self.running.discard(uid)
        samples = [
            ScoredSample(
                row, AgentLoopOutput([1], [2] * t, [1] * t, [-1.0] * t, versions), RewardResult(1.0, {}, None, 0)
            )
            for row in rows
            for t in [len(versions)]
        ]
        return samples, GenerationTimes(0, 1, 2)

    async def run(self):
        step_size, first = self.stream.updates * self.stream.prompts, self.served + 1
        options = {"lag": 0, "updates": self.stream.updates, "step": self.served, "last_step": self.last_step}
        passes = ForwardPasses({}, [], 1)
        async with rollout_pipeline(self.sampler, passes, overlaps_forward=False, **options) as rollouts:
            carried = 0
            for step in range(first, self.last_step + 1):
                uids = []
                for _ in range(self.stream.updates):
                    batch, _, state = await rollouts.finish(step, {})
                    assert state is None and self.served == step - 1
                    versions = batch.batch["weight_versions"]
                    age = step - 1 - versions[versions >= 0]
                    assert age.min() >= 0 and age.max() <= self.stream.max_staleness
                    if self.stream.drain:
                        assert all(len(set(row[row >= 0].tolist())) == 1 for row in versions)
                    uids += batch.non_tensor_batch["uid"].tolist()[::2]
                    await self.turns(20)
                await rollouts.wait_idle({})
                assert not (self.stream.drain and self.running)
                # The bound of the prompts that were carried into the step or started in it, and of those ahead of it.
                assert carried + self.ahead <= self.stream.in_progress
                carried = len(self.sampler.carried_prompts())
                assert self.sampler.prompt_counts().carried == carried
                assert carried <= self.stream.in_progress - step_size
                self.served, self.trained[step] = step, uids
                self.ahead = 0
                rollouts.on_new_weights(step)
                self.checkpoint = step, self.source.state, self.sampler.carried_prompts()
                await self.turns(10)


@pytest.mark.parametrize("seed", range(30))
async def test_an_asynchronous_run_is_bounded_and_resumes_exactly_wherever_it_is_killed(seed):
    chance = random.Random(seed)
    config = random_config(chance)
    trained, checkpoint, kills = {}, None, 0
    while True:
        run = AsyncRun(config, chance, checkpoint)
        task = asyncio.ensure_future(run.run())
        for _ in range(chance.randint(0, 400) if kills < 4 else 10**6):
            if task.done():
                break
            await asyncio.sleep(0)
        done = task.done()
        if not done:
            task.cancel()
        await asyncio.gather(task, return_exceptions=not done)
        await run.sampler.close()
        assert run.most_running <= run.stream.at_once * config.actor_rollout_ref.rollout.n_gpus_per_node
        trained, checkpoint = trained | run.trained, run.checkpoint
        kills += 1
        if done:
            break
    step_size = run.stream.updates * run.stream.prompts
    assert sorted(trained) == list(range(1, run.last_step + 1))
    assert all(len(uids) == step_size for uids in trained.values())
    # Every prompt of the data is trained on once, none is lost.
    expected = [f"{number}.0" for number in range(1, run.last_step * step_size + 1)]
    assert sorted(uid for uids in trained.values() for uid in uids) == sorted(expected)


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
