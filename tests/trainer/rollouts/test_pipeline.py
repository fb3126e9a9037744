"""Which rollout is generated when and under which weights, what finishes goes through the passes, errors end both."""

import asyncio

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses
from verl.trainer.rollouts.pipeline import Generated, rollout_pipeline
from verl.trainer.rollouts.prompts import Place
from verl.workers.engine.micro_batch import MicroBatching

LENGTHS = [3, 9, 4, 4, 7, 2, 5, 6]


def columns_of(samples):
    """[b, t] tokens of samples, each a (number, length), and a mask of those that are there."""
    width = max(length for _, length in samples)
    tokens = torch.zeros(len(samples), width)
    for row, (number, length) in enumerate(samples):
        tokens[row, :length] = 100.0 * number + torch.arange(length)
    return DataProto.from_dict(
        tensors={
            "responses": tokens,
            "response_mask": (torch.arange(width) < torch.tensor([n for _, n in samples])[:, None]).long(),
        }
    )


class World:
    """A trainer with weights and an engine that serves some; `log` is what happened."""

    def __init__(self, lag, last_step, streams=True, step=0, size=2):
        self.options = {"lag": lag, "last_step": last_step, "streams": streams, "step": step}
        self.trained = self.served = step
        self.log, self.generating, self.versions = [], 0, {}
        self.hold = {}  # step -> what its last sample waits for
        limits = [MicroBatching(size=size)]
        self.passes = ForwardPasses({"old_log_prob": self.forward}, limits, 1)

    def pipeline(self):
        return rollout_pipeline(self, self.passes, **self.options)

    async def generate(self, step, timing, arrived):
        self.generating += 1
        assert self.generating == 1, "one rollout at a time"
        self.log.append(f"generate {step}")
        versions = [self.served]
        samples = list(enumerate(LENGTHS))
        for row, sample in enumerate(samples):
            await asyncio.sleep(0)
            if row == len(samples) - 1 and step in self.hold:
                await self.hold[step]
            if arrived is not None:
                arrived(row, sample, sample[1])
            versions.append(self.served)
        timing["gen"] = 1.0 + step
        self.versions[step] = set(versions)
        self.generating -= 1
        self.log.append(f"generated {step}")
        return Generated(self.lay_out(samples), {"step": float(step)}, Place(step, {}))

    def lay_out(self, samples):
        return columns_of(samples)

    async def forward(self, batch, parts):
        """Depends on the weights, so that it shows under which ones a sample went through."""
        self.log.append(f"forward {len(batch)}")
        await asyncio.sleep(0)
        value = (batch.batch["responses"] * 0.5 + self.trained) * batch.batch["response_mask"]
        return DataProto.from_dict(tensors={"old_log_probs": value})

    async def train(self, rollouts, first, steps):
        for step in range(first, first + steps):
            timing = {}
            batch, metrics, behind = await rollouts.finish(step, timing)
            assert (metrics["step"], behind.draws) == (step, step)
            expected = (batch.batch["responses"] * 0.5 + step - 1) * batch.batch["response_mask"]
            assert torch.equal(batch.batch["old_log_probs"], expected), "the weights that train on the batch"
            self.log.append(f"train {step}")
            await asyncio.sleep(0)
            self.trained = step
            await rollouts.settle(timing)
            assert self.generating == 0
            self.served = step
            self.log.append(f"serve {step}")
            rollouts.serving(step)
            assert timing["gen"] == 1.0 + step
            yield timing


async def until(condition):
    """Let everything run that can run, at most until the condition holds."""
    for _ in range(200):
        if condition():
            break
        await asyncio.sleep(0)


def only(log, *words):
    return [line for line in log if line.split()[0] in words]


@pytest.mark.parametrize("streams", [True, False])
async def test_without_lag_they_take_turns(streams):
    world = World(0, 3, streams)
    async with world.pipeline() as rollouts:
        timings = [timing async for timing in world.train(rollouts, 1, 3)]
    turns = [f"{what} {k}" for k in (1, 2, 3) for what in ("generate", "generated", "train", "serve")]
    assert only(world.log, "generate", "generated", "train", "serve") == turns
    assert world.versions == {1: {0}, 2: {1}, 3: {2}}
    for timing in timings:
        assert timing.keys() == {"gen", "old_log_prob", "wait_for_rollout", "wait_for_trainer"}


async def test_without_lag_nothing_begins_before_its_step():
    world = World(0, 2)
    async with world.pipeline() as rollouts:
        async for _ in world.train(rollouts, 1, 1):
            pass
        await until(lambda: False)
        assert "generate 2" not in world.log


@pytest.mark.parametrize("streams", [True, False])
async def test_with_lag_every_batch_but_the_first_is_one_version_behind(streams):
    world = World(1, 5, streams)
    async with world.pipeline() as rollouts:
        timings = [timing async for timing in world.train(rollouts, 1, 5)]
    # Step k trains with the weights of version k - 1.
    assert world.versions == {1: {0}, 2: {0}, 3: {1}, 4: {2}, 5: {3}}
    order = only(world.log, "generate", "train", "serve")
    for k in (1, 2, 3, 4):
        assert order.index(f"generate {k + 1}") < order.index(f"train {k}")
    assert ["wait_for_trainer" in timing for timing in timings] == [True] * 4 + [False]


async def test_a_resumed_run_begins_with_its_own_step():
    world = World(1, 5, step=3)
    async with world.pipeline() as rollouts:
        async for _ in world.train(rollouts, 4, 2):
            pass
    assert world.versions == {4: {3}, 5: {3}}, "and nothing beyond the last step"


async def test_training_goes_on_while_the_next_batch_is_generated():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()
    async with world.pipeline() as rollouts:
        await rollouts.finish(1, {})
        settled = asyncio.ensure_future(rollouts.settle({}))
        await until(lambda: "generate 2" in world.log)
        await until(lambda: False)
        assert not settled.done(), "the weights would change inside of rollout 2"
        world.hold[2].set_result(None)
        await settled
        assert "generated 2" in world.log
        rollouts.serving(1)
        await until(lambda: "generate 3" in world.log)
        assert "generate 3" in world.log, "it need not wait for the log and the checkpoint of step 1"
        await rollouts.finish(2, {})


async def test_finished_samples_go_through_the_passes_before_the_last_one_is_there():
    world = World(0, 1, size=3)
    world.hold[1] = asyncio.get_running_loop().create_future()
    async with world.pipeline() as rollouts:
        batch = asyncio.ensure_future(rollouts.finish(1, {}))
        await until(lambda: "forward 3" in world.log)
        await until(lambda: False)
        # Seven are there: one micro-batch of three is full, another would be, but for knowing that none comes after it.
        assert only(world.log, "forward") == ["forward 3"] * 2 and "generated 1" not in world.log
        world.hold[1].set_result(None)
        await batch
        assert only(world.log, "forward") == ["forward 3", "forward 3", "forward 2"]


async def test_an_error_in_the_background_ends_the_training_at_once():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()
    cause = KeyError("the engine's own words")
    ended = []

    async def run():
        async with world.pipeline() as rollouts:
            await rollouts.finish(1, {})
            error = ValueError("no replica left")
            error.__cause__ = cause
            world.hold[2].set_exception(error)
            try:
                await asyncio.Event().wait()  # an update of the actor that takes for ever
            finally:
                ended.append(True)

    with pytest.raises(ValueError, match="no replica left") as caught:
        await asyncio.wait_for(run(), 60)
    assert ended and caught.value.__cause__ is cause


async def test_an_error_in_training_ends_the_background():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()
    with pytest.raises(ZeroDivisionError):
        async with world.pipeline() as rollouts:
            await rollouts.finish(1, {})
            await until(lambda: False)
            raise ZeroDivisionError
    assert world.hold[2].cancelled()


async def test_what_ends_the_run_from_outside_ends_both():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()

    async def run():
        async with world.pipeline() as rollouts:
            await rollouts.finish(1, {})
            await rollouts.settle({})

    task = asyncio.ensure_future(run())
    await until(lambda: False)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.hold[2].cancelled()
