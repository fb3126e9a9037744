"""Rollout schedule: order and weights of the rollouts, forward passes over finished samples, errors."""

import asyncio

import pytest
import torch

from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses
from verl.trainer.rollouts.pipeline import Generated, rollout_pipeline
from verl.trainer.rollouts.prompts import LoaderState
from verl.workers.engine.micro_batch import MicroBatching

LENGTHS = [3, 9, 4, 4, 7, 2, 5, 6]


def to_columns(samples):
    """Build tokens and mask [b, t] of samples, each a (number, length)."""
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
    """A trainer with weights and an engine that serves weights; `log` lists the events."""

    def __init__(self, lag, last_step, overlaps_forward=True, step=0, size=2):
        self.options = {"lag": lag, "last_step": last_step, "overlaps_forward": overlaps_forward, "step": step}
        self.trained = self.served = step
        self.log, self.generating, self.versions, self.idle = [], 0, {}, None
        self.hold = {}  # step -> future that its last sample waits for
        limits = [MicroBatching(size=size)]
        self.passes = ForwardPasses({"old_log_prob": self.forward}, limits, 1)

    def pipeline(self):
        return rollout_pipeline(self, self.passes, **self.options)

    async def generate(self, step, timing, on_sample_finished):
        self.generating += 1
        assert self.generating == 1, "one rollout at a time"
        self.log.append(f"generate {step}")
        versions = [self.served]
        samples = list(enumerate(LENGTHS))
        for row, sample in enumerate(samples):
            await asyncio.sleep(0)
            if row == len(samples) - 1 and step in self.hold:
                await self.hold[step]
            if on_sample_finished is not None:
                on_sample_finished(row, sample, sample[1])
            versions.append(self.served)
        timing["gen"] = 1.0 + step
        self.versions[step] = set(versions)
        self.generating -= 1
        self.log.append(f"generated {step}")
        return Generated(self.lay_out(samples), {"step": float(step)}, LoaderState(step, {}))

    def lay_out(self, samples):
        return to_columns(samples)

    async def pause(self):
        self.log.append("pause")
        return self.idle

    def on_new_weights(self, version):
        self.log.append(f"weights {version}")

    async def forward(self, batch, rank_rows):
        """Return values that depend on the weights, so that the test can tell which weights were used."""
        self.log.append(f"forward {len(batch)}")
        await asyncio.sleep(0)
        value = (batch.batch["responses"] * 0.5 + self.trained) * batch.batch["response_mask"]
        return DataProto.from_dict(tensors={"old_log_probs": value})

    async def train(self, rollouts, first, steps):
        for step in range(first, first + steps):
            timing = {}
            batch, metrics, state = await rollouts.finish(step, timing)
            assert (metrics["step"], state.draws) == (step, step)
            expected = (batch.batch["responses"] * 0.5 + step - 1) * batch.batch["response_mask"]
            assert torch.equal(batch.batch["old_log_probs"], expected), "the weights that train on the batch"
            self.log.append(f"train {step}")
            await asyncio.sleep(0)
            self.trained = step
            await rollouts.wait_idle(timing)
            assert self.generating == 0
            self.served = step
            self.log.append(f"serve {step}")
            rollouts.on_new_weights(step)
            assert timing["gen"] == 1.0 + step
            yield timing


async def run_until(condition):
    """Run the ready tasks, at most until the condition holds."""
    for _ in range(200):
        if condition():
            break
        await asyncio.sleep(0)


def events(log, *names):
    return [line for line in log if line.split()[0] in names]


@pytest.mark.parametrize("overlaps_forward", [True, False])
async def test_without_lag_generation_and_training_alternate(overlaps_forward):
    world = World(0, 3, overlaps_forward)
    async with world.pipeline() as rollouts:
        timings = [timing async for timing in world.train(rollouts, 1, 3)]
    turns = [f"{what} {k}" for k in (1, 2, 3) for what in ("generate", "generated", "train", "serve")]
    assert events(world.log, "generate", "generated", "train", "serve") == turns
    assert world.versions == {1: {0}, 2: {1}, 3: {2}}
    for timing in timings:
        assert timing.keys() == {"gen", "old_log_prob", "wait_for_rollout", "wait_for_trainer"}


async def test_without_lag_no_rollout_starts_before_its_step():
    world = World(0, 2)
    async with world.pipeline() as rollouts:
        async for _ in world.train(rollouts, 1, 1):
            pass
        await run_until(lambda: False)
        assert "generate 2" not in world.log


@pytest.mark.parametrize("overlaps_forward", [True, False])
async def test_with_lag_every_batch_except_the_first_is_one_version_behind(overlaps_forward):
    world = World(1, 5, overlaps_forward)
    async with world.pipeline() as rollouts:
        timings = [timing async for timing in world.train(rollouts, 1, 5)]
    # Step k trains with the weights of version k - 1.
    assert world.versions == {1: {0}, 2: {0}, 3: {1}, 4: {2}, 5: {3}}
    order = events(world.log, "generate", "train", "serve")
    for k in (1, 2, 3, 4):
        assert order.index(f"generate {k + 1}") < order.index(f"train {k}")
    assert ["wait_for_trainer" in timing for timing in timings] == [True] * 4 + [False]


async def test_a_step_of_several_updates_takes_a_rollout_for_each():
    world = World(0, 2)
    world.options["updates"], world.idle = 2, 1.5
    async with world.pipeline() as rollouts:
        for step in (1, 2):
            timing = {}
            for _ in range(2):
                assert (await rollouts.finish(step, {})).metrics == {"step": step}
            await rollouts.wait_idle(timing)
            assert timing["wait_for_trainer"] == 1.5, "as the generator counts it"
            world.served = step
            rollouts.on_new_weights(step)
    turns = [
        line for step in (1, 2) for line in [f"generate {step}", f"generated {step}"] * 2 + ["pause", f"weights {step}"]
    ]
    assert [line for line in world.log if not line.startswith("forward")] == turns


async def test_a_resumed_run_starts_with_the_next_step():
    world = World(1, 5, step=3)
    async with world.pipeline() as rollouts:
        async for _ in world.train(rollouts, 4, 2):
            pass
    assert world.versions == {4: {3}, 5: {3}}, "no rollout beyond the last step"


async def test_training_continues_while_the_next_batch_is_generated():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()
    async with world.pipeline() as rollouts:
        await rollouts.finish(1, {})
        idle = asyncio.ensure_future(rollouts.wait_idle({}))
        await run_until(lambda: "generate 2" in world.log)
        await run_until(lambda: False)
        assert not idle.done(), "the weights would change inside rollout 2"
        world.hold[2].set_result(None)
        await idle
        assert "generated 2" in world.log
        rollouts.on_new_weights(1)
        await run_until(lambda: "generate 3" in world.log)
        assert "generate 3" in world.log, "it does not wait for the log and the checkpoint of step 1"
        await rollouts.finish(2, {})


async def test_finished_samples_go_through_the_passes_before_the_last_one_finishes():
    world = World(0, 1, size=3)
    world.hold[1] = asyncio.get_running_loop().create_future()
    async with world.pipeline() as rollouts:
        batch = asyncio.ensure_future(rollouts.finish(1, {}))
        await run_until(lambda: "forward 3" in world.log)
        await run_until(lambda: False)
        # Seven have finished: two micro-batches of three are full, the seventh sample waits for others.
        assert events(world.log, "forward") == ["forward 3"] * 2 and "generated 1" not in world.log
        world.hold[1].set_result(None)
        await batch
        assert events(world.log, "forward") == ["forward 3", "forward 3", "forward 2"]


async def test_an_error_in_the_background_ends_training_at_once():
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
                await asyncio.Event().wait()  # an actor update that never ends
            finally:
                ended.append(True)

    with pytest.raises(ValueError, match="no replica left") as caught:
        await asyncio.wait_for(run(), 60)
    assert ended and caught.value.__cause__ is cause


async def test_an_error_in_training_cancels_the_background():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()
    with pytest.raises(ZeroDivisionError):
        async with world.pipeline() as rollouts:
            await rollouts.finish(1, {})
            await run_until(lambda: False)
            raise ZeroDivisionError
    assert world.hold[2].cancelled()


async def test_cancelling_the_run_cancels_the_background():
    world = World(1, 3)
    world.hold[2] = asyncio.get_running_loop().create_future()

    async def run():
        async with world.pipeline() as rollouts:
            await rollouts.finish(1, {})
            await rollouts.wait_idle({})

    task = asyncio.ensure_future(run())
    await run_until(lambda: False)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.hold[2].cancelled()
