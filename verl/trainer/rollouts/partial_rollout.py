"""Partial rollouts: a step trains on the prompts that are finished and carries the others over to the next step.

    step s     | start prompts until `in_progress` run | wait for `needed` of them | train | new weights |
    a group     started at s ----- not finished ------------------------------------------- cut, resumed --> s + 1

A group is a prompt with all of its samples. A step waits for each group that was carried over `max_staleness` times, so
that no token is trained on more than `max_staleness` weight updates after it was sampled. A step takes the groups that
started first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from verl.config import PPOConfig
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


def choose_groups(groups: Sequence[Group[T]], step: int, *, needed: int, max_staleness: int) -> list[Group[T]] | None:
    """Return the groups that `step` trains on, or None if it has to wait.

    Args:
        groups: groups in progress, in the order in which they started; at most `needed` of them started before `step`.
        step: the training step.
        needed: groups per step.
        max_staleness: steps that a group may be carried over.
    """
    done = [group for group in groups if group.task.done()]
    overdue = [group for group in groups if step - group.step >= max_staleness]
    if len(done) < needed or not all(group.task.done() for group in overdue):
        return None
    return done[:needed]


class CarriedGroups(Generic[T]):
    """The prompts in progress, from one step to the next.

    Args:
        generate: generates all samples of a row.
        needed: groups per step, `data.train_batch_size`.
        in_progress: groups in progress at the start of a step, `data.gen_batch_size`; at most 2 * `needed`, so that
            the carried groups always fit into the next step.
        max_staleness: steps that a group may be carried over, `rollout.max_staleness`.
    """

    def __init__(
        self,
        generate: Callable[[dict[str, Any]], Awaitable[T]],
        *,
        needed: int,
        in_progress: int,
        max_staleness: int,
    ):
        assert needed <= in_progress <= 2 * needed and max_staleness > 0, (needed, in_progress, max_staleness)
        self._generate = generate
        self._needed, self._in_progress, self._max_staleness = needed, in_progress, max_staleness
        self._resumed: deque[Prompt] = deque()
        self._groups: list[Group[T]] = []

    async def collect(self, step: int, steps_left: int, prompts: Iterator[Prompt]) -> list[T]:
        """Return the groups of a step, in the order in which they started; the others keep running.

        Args:
            step: the training step; steps must be collected in order.
            steps_left: number of steps left, this one included. No prompt is started that no step would train on.
            prompts: new prompts, drawn as needed.

        Raises:
            Exception: `generate` failed for any group; raised as soon as it is noticed.
        """
        while len(self._groups) < min(self._in_progress, self._needed * steps_left):
            prompt = self._resumed.popleft() if self._resumed else next(prompts)
            task = asyncio.ensure_future(self._generate(prompt.row))
            self._groups.append(Group(prompt.id, step, task))
        while True:
            for group in self._groups:
                if group.task.done():
                    group.task.result()
            chosen = choose_groups(self._groups, step, needed=self._needed, max_staleness=self._max_staleness)
            if chosen is not None:
                break
            running = [group.task for group in self._groups if not group.task.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        self._groups = [group for group in self._groups if group not in chosen]
        return [group.task.result() for group in chosen]

    def prompt_ids(self) -> list[PromptId]:
        """Return the prompts that were drawn and not yet collected, in the order of their draws."""
        return [group.prompt_id for group in self._groups] + [prompt.id for prompt in self._resumed]

    def resume(self, prompts: Sequence[Prompt]) -> None:
        """Start with the prompts that an earlier run had in progress; their samples are generated again."""
        assert not self._groups, "call resume() before the first collect()"
        self._resumed.extend(prompts)

    async def close(self) -> None:
        """Cancel the groups in progress."""
        groups, self._groups = self._groups, []
        await cancel_and_wait(group.task for group in groups)


def make_carried_groups(
    config: PPOConfig, generate: Callable[[dict[str, Any]], Awaitable[T]]
) -> CarriedGroups[T] | None:
    """Build the `CarriedGroups` that the config asks for; None without partial rollouts."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    if not rollout.partial_rollout:
        return None
    assert data.gen_batch_size is not None
    return CarriedGroups(
        generate,
        needed=data.train_batch_size,
        in_progress=data.gen_batch_size,
        max_staleness=rollout.max_staleness,
    )


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
