"""Schedule of the rollouts: which batch is generated when, as the training loop sees it.

Rollouts are numbered by the step that trains on them and are generated one after the other, in the background. Without
lag a step starts its own rollout; with `trainer.rollout_lag=1` the rollout of the next step runs while a step trains:

    rollouts.finish(k)              wait for rollout k, start rollout k + 1
    <train on it>
    rollouts.wait_idle()            wait for rollout k + 1: the weights change between two rollouts, never inside one
    <new weights, version k>
    rollouts.on_new_weights(k)      start rollout k + 2

While the trainer waits, finished samples go through the forward passes, under the weights that will train on them.

In a fully asynchronous run a step has several rollouts, one for each local update of the trainer; `partial_rollout.py`
generates their prompts all the time, and a rollout only takes those that are finished.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np

from verl.protocol import DataProto
from verl.trainer.rollouts.forward_passes import ForwardPasses, join_parts
from verl.trainer.rollouts.prompts import LoaderState
from verl.utils.timing import add_stage, marked_timer

# Called with each sample that finishes: its row in the batch, the sample, its number of tokens, prompt included.
OnSampleFinished = Callable[[int, Any, int], None]


class Generated(NamedTuple):
    """A batch of scored samples.

    Attributes:
        batch: in the layout of `verl.agent_loop.generation.to_batch`.
        metrics: metrics of its generation and rewards.
        loader_state: the loader state after its prompts; None if the prompt source already has it, because the prompts
            in progress are stored separately.
    """

    batch: DataProto
    metrics: dict[str, float]
    loader_state: LoaderState | None


class BatchGenerator(Protocol):
    """Generates batches of scored samples."""

    async def generate(
        self, step: int, timing: MutableMapping[str, float], on_sample_finished: OnSampleFinished | None
    ) -> Generated:
        """Generate the batch of a step."""

    def lay_out(self, samples: Sequence[Any]) -> DataProto:
        """Turn samples into columns."""

    async def pause(self) -> float | None:
        """Prepare for new weights; return seconds in which the replicas were idle, if the generator counts them."""

    def on_new_weights(self, version: int) -> None:
        """Note that the replicas serve the weights of step `version`."""


class Rollout:
    """The batch of `step` while it is generated.

    Attributes:
        timing: seconds of its stages.
        generated: the batch, once all samples have finished.
        finished: set once all samples have finished.
        computed: row numbers and columns of the samples that went through the forward passes.
    """

    def __init__(self, step: int, passes: ForwardPasses):
        self.step = step
        self.timing: dict[str, float] = {}
        self.generated: Generated | None = None
        self.finished = asyncio.Event()
        self.computed: list[tuple[list[int], DataProto]] = []
        self._accumulator = passes.make_accumulator()
        self._changed = asyncio.Event()

    def on_sample_finished(self, row: int, sample: Any, tokens: int) -> None:
        """Add a finished sample."""
        self._accumulator.add(row, sample, tokens)
        self._changed.set()

    def finish(self, generated: Generated) -> None:
        """Set the batch: all samples have finished."""
        self.generated = generated
        self.finished.set()
        self._changed.set()

    async def next_micro_batches(self) -> list[list[tuple[int, Any]]] | None:
        """Wait for a full micro-batch per rank and return its (row, sample) pairs; None once generation has ended."""
        while not self.finished.is_set():
            if (parts := self._accumulator.pop_micro_batches()) is not None:
                return parts
            self._changed.clear()
            await self._changed.wait()
        return None


class RolloutPipeline:
    """The rollouts of a run; made by `rollout_pipeline`.

    Args:
        group: runs the background tasks.
        generator: generates the batches.
        passes: the forward passes that every sample needs before it is trained on.
        lag: number of steps by which generation is ahead of training.
        updates: rollouts in a step; above 1 only without lag.
        step: the last finished step, from which the run continues.
        last_step: no batch is generated for a later step.
        overlaps_forward: True if samples go through the passes as they finish, False if after the last one.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        generator: BatchGenerator,
        passes: ForwardPasses,
        *,
        lag: int,
        updates: int,
        step: int,
        last_step: int,
        overlaps_forward: bool,
    ):
        assert updates == 1 or not lag, (updates, lag)
        self._group, self._generator, self._passes = group, generator, passes
        self._lag, self._updates, self._overlaps_forward = lag, updates, overlaps_forward
        self._step, self._last_rollout = step, last_step * updates
        # Rollouts are counted from the first step of the run.
        self._started = self._taken = step * updates
        self._rollouts: deque[Rollout] = deque()
        self._idle_since: int | None = None

    async def finish(self, step: int, timing: MutableMapping[str, float]) -> Generated:
        """Return the next batch of `step` with the columns of all passes; start the next rollout as far as lag allows.

        Args:
            step: the training step.
            timing: receives `gen` and `reward`, even if they ran during an earlier step; the stages of the passes; and
                `wait_for_rollout`, the seconds in which the trainer was idle.
        """
        self._step = step
        self._start_until(self._taken + 1 + self._lag)
        rollout = self._rollouts[0]
        assert rollout.step == step, (rollout.step, step)
        await self._wait_for(rollout, timing)
        self._rollouts.popleft()
        self._taken += 1
        generated = rollout.generated
        assert generated is not None and generated.batch.batch is not None
        computed_rows = {row for rows, _ in rollout.computed for row in rows}
        rest = [row for row in range(len(generated.batch)) if row not in computed_rows]
        if rest:
            remaining = generated.batch[rest] if computed_rows else generated.batch
            rollout.computed.append((rest, await self._passes.run(remaining, timing)))
        columns = join_parts(rollout.computed, generated.batch.batch["responses"].shape[1])
        for name, seconds in rollout.timing.items():
            timing[name] = timing.get(name, 0.0) + seconds
        return generated._replace(batch=generated.batch.union(columns))

    async def wait_idle(self, timing: MutableMapping[str, float]) -> None:
        """Wait until no sample is being generated that new weights must not change.

        Args:
            timing: as for `finish`, and `wait_for_trainer`, the seconds in which the replicas were idle.
        """
        for rollout in self._rollouts:
            await self._wait_for(rollout, timing)
        with marked_timer("wait_for_rollout", timing):
            idle = await self._generator.pause()
        if idle is not None:
            timing["wait_for_trainer"], self._idle_since = idle, None
        if self._idle_since is not None:
            now = time.monotonic_ns()
            add_stage("wait_for_trainer", timing, self._idle_since, now, overlaps=True, step=self._step)
            self._idle_since = None

    def on_new_weights(self, version: int) -> None:
        """Note that the replicas serve the weights of step `version`; with a lag, start the rollout that uses them."""
        self._generator.on_new_weights(version)
        if self._lag:
            self._start_until(version + 1 + self._lag)

    def _start_until(self, number: int) -> None:
        while self._started < min(number, self._last_rollout):
            previous = self._rollouts[-1].finished if self._rollouts else None
            self._rollouts.append(Rollout(self._started // self._updates + 1, self._passes))
            self._started += 1
            self._group.create_task(self._generate(self._rollouts[-1], previous))

    async def _generate(self, rollout: Rollout, previous: asyncio.Event | None) -> None:
        if previous is not None:
            await previous.wait()
        callback = rollout.on_sample_finished if self._overlaps_forward else None
        rollout.finish(await self._generator.generate(rollout.step, rollout.timing, callback))
        self._idle_since = time.monotonic_ns()

    async def _wait_for(self, rollout: Rollout, timing: MutableMapping[str, float]) -> None:
        """Wait for the end of a rollout; meanwhile run the passes over full micro-batches."""
        while True:
            with marked_timer("wait_for_rollout", timing):
                parts = await rollout.next_micro_batches()
            if parts is None:
                return
            rows, samples = zip(*(pair for part in parts for pair in part), strict=True)
            ends = np.cumsum([len(part) for part in parts])
            rank_rows = np.split(np.arange(len(rows)), ends[:-1])
            columns = await self._passes.run(self._generator.lay_out(samples), timing, rank_rows)
            rollout.computed.append((list(rows), columns))


@asynccontextmanager
async def rollout_pipeline(
    generator: BatchGenerator,
    passes: ForwardPasses,
    *,
    lag: int,
    step: int,
    last_step: int,
    overlaps_forward: bool,
    updates: int = 1,
) -> AsyncIterator[RolloutPipeline]:
    """Run a `RolloutPipeline` and its background tasks; arguments as for `RolloutPipeline`.

    Raises:
        Exception: the first error in the background or in the block; the other of the two is cancelled at once.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield RolloutPipeline(
                group,
                generator,
                passes,
                lag=lag,
                updates=updates,
                step=step,
                last_step=last_step,
                overlaps_forward=overlaps_forward,
            )
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
