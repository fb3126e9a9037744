"""Partial rollouts: a step takes the prompts that are done and carries the others over to the next one.

    step s     | start prompts until `under_way` are under way | wait for `needed` of them | train | new weights |
    a group     started at s ----- still going ------------------------------------------------- cut, goes on --> s + 1

A group is a prompt with all of its samples. One that was carried over `max_staleness` times is waited for, so that no
token is trained more than `max_staleness` weight updates after it was sampled. A step takes what started first.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from verl.config import PPOConfig
from verl.protocol import DataProto

T = TypeVar("T")


class Position(NamedTuple):
    """Where a prompt stands in the data: plain numbers, fit for a checkpoint.

    Attributes:
        number: of its draw, from 1; what its `uid` is made of.
        epoch, sample: what the data loader's position was, from 0.
    """

    number: int
    epoch: int
    sample: int


class Prompt(NamedTuple):
    """A row of the data and where it stands."""

    row: dict[str, Any]
    position: Position


@dataclass(frozen=True)
class Group(Generic[T]):
    """A prompt under way; `step` is when it started."""

    position: Position
    step: int
    work: asyncio.Task[T]


def choose(groups: Sequence[Group[T]], step: int, *, needed: int, max_staleness: int) -> list[Group[T]] | None:
    """What `step` trains on, or None as long as it has to wait.

    Args:
        groups: under way, in the order in which they started; at most `needed` of them before `step`.
        needed: groups of a step.
        max_staleness: steps that a group may be carried over.
    """
    done = [group for group in groups if group.work.done()]
    overdue = [group for group in groups if step - group.step >= max_staleness]
    if len(done) < needed or not all(group.work.done() for group in overdue):
        return None
    return done[:needed]


class CarriedGroups(Generic[T]):
    """The prompts under way, from one step to the next.

    Args:
        generate: all samples of a row.
        needed: groups of a step, `data.train_batch_size`.
        under_way: groups at the start of a step, `data.gen_batch_size`; at most twice as many as `needed`, so that
            those carried over always fit into the next step.
        max_staleness: steps that a group may be carried over, `rollout.max_staleness`.
    """

    def __init__(
        self,
        generate: Callable[[dict[str, Any]], Awaitable[T]],
        *,
        needed: int,
        under_way: int,
        max_staleness: int,
    ):
        assert needed <= under_way <= 2 * needed and max_staleness > 0, (needed, under_way, max_staleness)
        self._generate = generate
        self._needed, self._under_way, self._max_staleness = needed, under_way, max_staleness
        self._waiting: deque[Prompt] = deque()
        self._groups: list[Group[T]] = []

    async def take(self, step: int, steps_left: int, prompts: Iterator[Prompt]) -> list[T]:
        """The groups of a step, in the order in which they started; the others go on.

        Args:
            step: the training step; one is asked for after the other.
            steps_left: this one and those after it. No prompt is begun that no step would train on.
            prompts: drawn from as far as needed.

        Raises:
            What `generate` raised, for whichever group, as soon as it is seen.
        """
        while len(self._groups) < min(self._under_way, self._needed * steps_left):
            prompt = self._waiting.popleft() if self._waiting else next(prompts)
            work = asyncio.ensure_future(self._generate(prompt.row))
            self._groups.append(Group(prompt.position, step, work))
        while True:
            for group in self._groups:
                if group.work.done():
                    group.work.result()
            taken = choose(self._groups, step, needed=self._needed, max_staleness=self._max_staleness)
            if taken is not None:
                break
            running = [group.work for group in self._groups if not group.work.done()]
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        self._groups = [group for group in self._groups if group not in taken]
        return [group.work.result() for group in taken]

    def positions(self) -> list[Position]:
        """Prompts that were drawn and not yet taken, in the order of their draws."""
        return [group.position for group in self._groups] + [prompt.position for prompt in self._waiting]

    def resume(self, prompts: Sequence[Prompt]) -> None:
        """Begin with these, which another run had under way: their samples are generated anew."""
        assert not self._groups, "before the first take()"
        self._waiting.extend(prompts)

    async def close(self) -> None:
        """End what is under way."""
        groups, self._groups = self._groups, []
        for group in groups:
            group.work.cancel()
        await asyncio.gather(*(group.work for group in groups), return_exceptions=True)


def carried_groups(config: PPOConfig, generate: Callable[[dict[str, Any]], Awaitable[T]]) -> CarriedGroups[T] | None:
    """As the config wants them; None without partial rollouts."""
    data, rollout = config.data, config.actor_rollout_ref.rollout
    if not rollout.partial_rollout:
        return None
    assert data.gen_batch_size is not None
    sizes = {"needed": data.train_batch_size, "under_way": data.gen_batch_size}
    return CarriedGroups(generate, **sizes, max_staleness=rollout.max_staleness)


def staleness_metrics(batch: DataProto, version: int) -> dict[str, float]:
    """How old a batch is, in weight updates.

    Args:
        batch: `weight_versions` [B, T] int64, -1 where no model token stands.
        version: of the weights that the trainer starts the step with.

    Returns:
        partial_rollout/staleness/{max,mean}: of a sample, by its oldest token; /resumed_samples: share of the samples
        that several versions made.
    """
    assert batch.batch is not None
    versions = batch.batch["weight_versions"]
    answered = (versions >= 0).any(dim=-1)
    if not answered.any():
        return {}
    newest = versions[answered].amax(dim=-1)
    oldest = versions[answered].masked_fill(versions[answered] < 0, version + 1).amin(dim=-1)
    age = (version - oldest).double()
    return {
        "partial_rollout/staleness/max": float(age.max()),
        "partial_rollout/staleness/mean": float(age.mean()),
        "partial_rollout/resumed_samples": float((newest > oldest).double().mean()),
    }
