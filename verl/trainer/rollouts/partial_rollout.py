"""Prompts in progress: a step trains on those that are finished and carries the others over to the next step.

    step s     | start prompts until `in_progress` run | wait for `prompts` of them | train | new weights |
    a group     started at s ----- not finished ------------------------------------------- cut, resumed --> s + 1

A group is a prompt with all of its samples. A group is trained on at most `max_staleness` steps after the one in which
it started, so that no token is older than `max_staleness` weight updates: an update waits for a group if later ones
could not train on it in time. Of the finished groups it takes those that started first.

In a fully asynchronous run a step has several local updates, and prompts also start while the trainer works:

    trainer    | wait, update | wait, update | wait | update ... | new weights |
    replicas   | a b c d e f g h ... as each ends, the next one starts ........ | i j k ...

At the start of a step at most `in_progress` minus the carried prompts may start; the replicas then wait for the next
weight update. This bounds the prompts that are generated ahead of an update.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from verl.config import PPOConfig
from verl.config.stream import Stream, resolve_stream
from verl.preflight.placement import replica_count
from verl.protocol import DataProto
from verl.trainer.rollouts.prompts import Prompt, PromptId
from verl.utils.asyncio_utils import cancel_and_wait

T = TypeVar("T")


@dataclass(frozen=True)
class Group(Generic[T]):
    """A prompt in progress; `step` is the step in which it started."""

    prompt_id: PromptId
    step: int
    task: asyncio.Task[T]


def choose_groups(
    groups: Sequence[Group[T]], needed: int, later_capacity: Callable[[int], int], max_staleness: int
) -> list[Group[T]] | None:
    """Return the groups that a local update trains on, or None if it has to wait.

    Args:
        groups: groups in progress, in the order in which they started.
        needed: groups to choose.
        later_capacity: the number of groups that later local updates will train on, to the end of a step.
        max_staleness: steps that a group may be carried over.
    """
    chosen = [group for group in groups if group.task.done()][:needed]
    if len(chosen) < needed:
        return None
    left = [group for group in groups if group not in chosen]
    late = any(number >= later_capacity(group.step + max_staleness) for number, group in enumerate(left))
    return None if late else chosen


class CarriedGroups(Generic[T]):
    """The prompts in progress, from one step to the next.

    A prompt starts as soon as the limits of `stream` allow it: when a step begins, and when another one has finished.

    Args:
        generate: generates all samples of a row.
        prompts: new prompts, drawn as needed.
        stream: the limits.
        at_once: groups to generate at the same time.
        total_steps: number of training steps of the run. No prompt is started that no step would train on.

    Attributes:
        updates: number of local updates in a step.
        finished: number of groups that finished so far.
        carried: number of groups in progress at the last `pause`.
    """

    def __init__(
        self,
        generate: Callable[[dict[str, Any]], Awaitable[T]],
        prompts: Iterator[Prompt],
        stream: Stream,
        *,
        at_once: int,
        total_steps: int,
    ):
        step_size = stream.updates * stream.prompts
        assert step_size <= stream.in_progress <= (1 + stream.max_staleness) * step_size, stream
        self._generate, self._prompts, self._stream = generate, prompts, stream
        self._at_once, self._total_steps = at_once, total_steps
        self._resumed: deque[Prompt] = deque()
        self._groups: list[Group[T]] = []
        self._step = 0
        self._updates_left = 0
        self._may_start = 0
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._idle_since: int | None = None
        self._idle_ns = 0
        self.updates, self.finished, self.carried = stream.updates, 0, 0

    def begin_step(self, step: int) -> None:
        """Start the prompts of a step; call it when the replicas have the weights that its new prompts start with.

        Args:
            step: the training step; later calls for the same step have no effect.
        """
        if step == self._step or step > self._total_steps:
            return
        self._step, self._updates_left = step, self._stream.updates
        self._may_start = self._stream.in_progress - len(self._groups)
        self._start_prompts()

    async def collect(self, step: int) -> list[T]:
        """Return the groups of a local update, in the order in which they started; the others keep running.

        Args:
            step: the training step; it is collected `stream.updates` times before the next one.

        Raises:
            Exception: `generate` failed for any group, or reading a prompt failed; raised as soon as it is noticed.
        """
        self.begin_step(step)
        assert step == self._step and self._updates_left > 0, (step, self._step, self._updates_left)
        while True:
            self._changed.clear()
            self._raise_errors()
            chosen = choose_groups(self._groups, self._stream.prompts, self._later_capacity, self._stream.max_staleness)
            if chosen is not None:
                break
            await self._changed.wait()
        self._updates_left -= 1
        self._groups = [group for group in self._groups if group not in chosen]
        return [group.task.result() for group in chosen]

    async def pause(self) -> float:
        """Start no prompt until the next step begins; with `stream.drain`, wait for the prompts that are generated.

        Returns:
            Seconds since the last call in which no prompt was generated.

        Raises:
            Exception: as `collect`.
        """
        self._may_start = 0
        while self._stream.drain and self._running:
            self._changed.clear()
            self._raise_errors()
            await self._changed.wait()
        self._raise_errors()
        self.carried = len(self._groups)
        self._count_idle(ends=False)
        idle, self._idle_ns = self._idle_ns, 0
        return idle / 1e9

    def prompt_ids(self) -> list[PromptId]:
        """Return the prompts that were drawn and not yet collected, in the order of their draws."""
        return [group.prompt_id for group in self._groups] + [prompt.id for prompt in self._resumed]

    def resume(self, prompts: Sequence[Prompt]) -> None:
        """Start with the prompts that an earlier run had in progress; their samples are generated again."""
        assert not self._groups, "call resume() before the first step"
        self._resumed.extend(prompts)

    async def close(self) -> None:
        """Cancel the groups in progress."""
        self._may_start = 0
        groups, self._groups = self._groups, []
        await cancel_and_wait(group.task for group in groups)

    @property
    def _running(self) -> int:
        return sum(not group.task.done() for group in self._groups)

    def _capacity(self, step: int) -> int:
        """Return how many groups will be trained on from now to the end of `step`."""
        steps = min(step, self._total_steps) - self._step
        return self._stream.prompts * (self._updates_left + self._stream.updates * steps)

    def _later_capacity(self, step: int) -> int:
        """Return how many groups will be trained on after the next local update, to the end of `step`."""
        return self._capacity(step) - self._stream.prompts

    def _start_prompts(self) -> None:
        """Start as many prompts as the limits allow."""
        while (
            self._may_start > 0
            and self._running < self._at_once
            and len(self._groups) < self._capacity(self._total_steps)
        ):
            self._count_idle(ends=True)
            prompt = self._resumed.popleft() if self._resumed else next(self._prompts)
            task = asyncio.ensure_future(self._generate(prompt.row))
            self._groups.append(Group(prompt.id, self._step, task))
            self._may_start -= 1
            task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Future[T]) -> None:
        if task.cancelled():
            return
        self.finished += 1
        try:
            self._start_prompts()
        except Exception as error:  # noqa: BLE001  (asyncio would only log it; collect() raises it)
            self._error = error
        if not self._running:
            self._idle_since = time.monotonic_ns()
        self._changed.set()

    def _count_idle(self, *, ends: bool) -> None:
        """Add the time since the last prompt finished, if none is being generated."""
        if self._idle_since is not None:
            now = time.monotonic_ns()
            self._idle_ns += now - self._idle_since
            self._idle_since = None if ends else now

    def _raise_errors(self) -> None:
        if self._error is not None:
            raise self._error
        for group in self._groups:
            if group.task.done():
                group.task.result()


def make_carried_groups(
    config: PPOConfig,
    generate: Callable[[dict[str, Any]], Awaitable[T]],
    prompts: Iterator[Prompt],
    total_steps: int,
) -> CarriedGroups[T] | None:
    """Build the `CarriedGroups` that the config asks for; None if no prompt is carried over a step."""
    stream = resolve_stream(config)
    if stream is None:
        return None
    at_once = stream.in_progress if stream.at_once is None else stream.at_once * replica_count(config)
    return CarriedGroups(generate, prompts, stream, at_once=at_once, total_steps=total_steps)


def staleness_metrics(batch: DataProto, version: int) -> dict[str, float]:
    """Age of a batch, in weight updates.

    Args:
        batch: `weight_versions` [B, T] int64, -1 at positions without a model token.
        version: version of the weights that the trainer starts the step with.

    Returns:
        `partial_rollout/staleness/{max,mean}`: age of a sample, by its oldest token; and
        `partial_rollout/resumed_samples`: fraction of the samples that several versions generated. Empty if no sample
        has a model token.
    """
    assert batch.batch is not None
    versions = batch.batch["weight_versions"]
    nonempty = (versions >= 0).any(dim=-1)
    if not nonempty.any():
        return {}
    newest = versions[nonempty].amax(dim=-1)
    oldest = versions[nonempty].masked_fill(versions[nonempty] < 0, version + 1).amin(dim=-1)
    age = (version - oldest).double()
    return {
        "partial_rollout/staleness/max": float(age.max()),
        "partial_rollout/staleness/mean": float(age.mean()),
        "partial_rollout/resumed_samples": float((newest > oldest).double().mean()),
    }
