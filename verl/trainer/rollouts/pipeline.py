"""Which batch is generated when: the rollouts of a run as the training loop sees them.

Rollouts are numbered by the step that trains on them and are generated one after the other, in the background. Without
lag a step begins its own; with `trainer.rollout_lag=1` that of the next step is generated while a step trains:

    rollouts.finish(k)      wait for rollout k, begin rollout k + 1
    <train on it>
    rollouts.settle()       wait for rollout k + 1: the weights change between two rollouts, never inside one
    <new weights, version k>
    rollouts.serving(k)     begin rollout k + 2

While the trainer waits, finished samples go through the forward passes, under the weights that will train on them.
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
from verl.trainer.rollouts.forward_passes import ForwardPasses, joined
from verl.trainer.rollouts.prompts import Place
from verl.utils.timing import add_stage, marked_timer


class Generated(NamedTuple):
    """A batch of scored samples.

    Attributes:
        batch: as `verl.agent_loop.generation.to_batch` lays it out.
        metrics: of its generation and rewards.
        behind: the place in the data after its prompts.
    """

    batch: DataProto
    metrics: dict[str, float]
    behind: Place


class Sampling(Protocol):
    """Makes batches of scored samples."""

    async def generate(
        self, step: int, timing: MutableMapping[str, float], arrived: Callable[[int, Any, int], None] | None
    ) -> Generated:
        """The batch of a step. `arrived`, where given, is told of each sample that finishes: row, sample, tokens."""

    def lay_out(self, samples: Sequence[Any]) -> DataProto:
        """Some samples as columns."""


class Rollout:
    """The batch of `step` while it is generated; `seen` are the columns of rows that went through the passes."""

    def __init__(self, step: int, passes: ForwardPasses):
        self.step = step
        self.timing: dict[str, float] = {}
        self.generated: Generated | None = None
        self.over = asyncio.Event()
        self.seen: list[tuple[list[int], DataProto]] = []
        self._arrivals = passes.arrivals()
        self._news = asyncio.Event()

    def arrived(self, row: int, sample: Any, tokens: int) -> None:
        """A sample has finished."""
        self._arrivals.add(row, sample, tokens)
        self._news.set()

    def end(self, generated: Generated) -> None:
        """All samples have finished."""
        self.generated = generated
        self.over.set()
        self._news.set()

    async def micro_batches(self) -> list[list[tuple[int, Any]]] | None:
        """(row, sample) of a full micro-batch for each rank as soon as there is one; None once generation is over."""
        while not self.over.is_set():
            if (parts := self._arrivals.micro_batches()) is not None:
                return parts
            self._news.clear()
            await self._news.wait()
        return None


class RolloutPipeline:
    """The rollouts of a run, inside of `rollout_pipeline`.

    Args:
        group: runs what goes on in the background.
        sampling: generates.
        passes: what every sample goes through before it is trained on.
        lag: steps that generation is ahead of training.
        step: the last one that is done already, from which the run goes on.
        last_step: no batch is generated for a later one.
        streams: whether samples go through the passes as they finish; otherwise after the last one.
    """

    def __init__(
        self,
        group: asyncio.TaskGroup,
        sampling: Sampling,
        passes: ForwardPasses,
        *,
        lag: int,
        step: int,
        last_step: int,
        streams: bool,
    ):
        self._group, self._sampling, self._passes = group, sampling, passes
        self._lag, self._last_step, self._streams = lag, last_step, streams
        self._step = self._begun = step
        self._rollouts: deque[Rollout] = deque()
        self._idle_since: int | None = None

    async def finish(self, step: int, timing: MutableMapping[str, float]) -> Generated:
        """The batch of `step` with the columns of all passes; the next one is begun, as far as lag allows.

        Args:
            timing: gets `gen` and `reward`, whenever they were; the stages of the passes; and `wait_for_rollout`,
                seconds in which the trainer had nothing to do.
        """
        self._step = step
        self._begin(step + self._lag)
        rollout = self._rollouts[0]
        assert rollout.step == step, (rollout.step, step)
        await self._look(rollout, timing)
        self._rollouts.popleft()
        generated = rollout.generated
        assert generated is not None and generated.batch.batch is not None
        seen = {row for rows, _ in rollout.seen for row in rows}
        rest = [row for row in range(len(generated.batch)) if row not in seen]
        if rest:
            unseen = generated.batch[rest] if seen else generated.batch
            rollout.seen.append((rest, await self._passes.run(unseen, timing)))
        columns = joined(rollout.seen, generated.batch.batch["responses"].shape[1])
        for name, seconds in rollout.timing.items():
            timing[name] = timing.get(name, 0.0) + seconds
        return generated._replace(batch=generated.batch.union(columns))

    async def settle(self, timing: MutableMapping[str, float]) -> None:
        """Wait until no sample is being generated.

        Args:
            timing: as for `finish`, and `wait_for_trainer`: seconds since the replicas had nothing to do.
        """
        for rollout in self._rollouts:
            await self._look(rollout, timing)
        if self._idle_since is not None:
            now = time.monotonic_ns()
            add_stage("wait_for_trainer", timing, self._idle_since, now, overlaps=True, step=self._step)
            self._idle_since = None

    def serving(self, version: int) -> None:
        """The replicas serve the weights of step `version`: with a lag, begin what is generated with them."""
        if self._lag:
            self._begin(version + 1 + self._lag)

    def _begin(self, step: int) -> None:
        while self._begun < min(step, self._last_step):
            self._begun += 1
            before = self._rollouts[-1].over if self._rollouts else None
            self._rollouts.append(Rollout(self._begun, self._passes))
            self._group.create_task(self._generate(self._rollouts[-1], before))

    async def _generate(self, rollout: Rollout, before: asyncio.Event | None) -> None:
        if before is not None:
            await before.wait()
        arrived = rollout.arrived if self._streams else None
        rollout.end(await self._sampling.generate(rollout.step, rollout.timing, arrived))
        self._idle_since = time.monotonic_ns()

    async def _look(self, rollout: Rollout, timing: MutableMapping[str, float]) -> None:
        """Wait for the end of a rollout; meanwhile put what finishes through the passes."""
        while True:
            with marked_timer("wait_for_rollout", timing):
                parts = await rollout.micro_batches()
            if parts is None:
                return
            rows, samples = zip(*(pair for part in parts for pair in part), strict=True)
            ends = np.cumsum([len(part) for part in parts])
            of_ranks = np.split(np.arange(len(rows)), ends[:-1])
            columns = await self._passes.run(self._sampling.lay_out(samples), timing, of_ranks)
            rollout.seen.append((list(rows), columns))


@asynccontextmanager
async def rollout_pipeline(sampling: Sampling, passes: ForwardPasses, **options: Any) -> AsyncIterator[RolloutPipeline]:
    """A `RolloutPipeline` and its background.

    Raises:
        Whatever is raised first, in the background or in the block; the other of the two is cancelled at once.
    """
    try:
        async with asyncio.TaskGroup() as group:
            yield RolloutPipeline(group, sampling, passes, **options)
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
