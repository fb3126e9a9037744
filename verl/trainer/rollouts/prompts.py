"""Training prompts: read, put through the chat template and tokenized one batch ahead of their use.

With a sampler of the user, a batch is read when it is needed, because earlier batches may decide about it.

A checkpoint stores the progress of training, not of reading. So each draw carries the loader state after it, and the
caller that trains on a draw sets `PromptSource.state` to that state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from verl.protocol import DataProto
from verl.utils.dataset.loader import EpochDataLoader
from verl.utils.dataset.sampled_loader import SampledDataLoader


class LoaderState(NamedTuple):
    """A point between two draws, in plain values that a checkpoint can store.

    Attributes:
        draws: number of draws before it.
        loader: state of the data loader at it. That of a `SampledDataLoader` is complete after `on_trained`.
    """

    draws: int
    loader: dict[str, Any]


class PromptId(NamedTuple):
    """The identity of a prompt, in plain numbers that a checkpoint can store.

    Attributes:
        number: number of its draw, from 1; its `uid` starts with it.
        epoch: epoch that it was read in, from 0.
        sample: number of samples that the loader had read before it in that epoch.
    """

    number: int
    epoch: int
    sample: int


class Prompt(NamedTuple):
    """A row of the data and its identity."""

    row: dict[str, Any]
    id: PromptId


class Draw(NamedTuple):
    """One batch of prompts.

    Attributes:
        rows: one dict per prompt, each with a unique `uid`.
        state: the loader state after this draw.
    """

    rows: list[dict[str, Any]]
    state: LoaderState


def to_rows(batch: Mapping[str, Sequence[Any]], number: int | str) -> list[dict[str, Any]]:
    """Turn a collated batch into one dict per prompt, with `uid` = "<number>.<index in the batch>".

    Args:
        batch: columns of equal length.
        number: number of the draw, or another name of the batch that no other batch has.
    """
    size = len(next(iter(batch.values())))
    return [{**{key: column[i] for key, column in batch.items()}, "uid": f"{number}.{i}"} for i in range(size)]


class PromptSource:
    """An endless sequence of batches of training prompts, epoch after epoch.

    Args:
        loader: must have no other reader.

    Attributes:
        state: the loader state after the last draw that was trained on; the caller sets it. A resumed run continues
            from it.
    """

    def __init__(self, loader: EpochDataLoader | SampledDataLoader):
        self._loader = loader
        self._batches = self._endless_batches()
        self._next_draw: asyncio.Task[Draw] | None = None
        self._draws = 0
        self.state = LoaderState(0, loader.state_dict())

    def _endless_batches(self) -> Iterator[Mapping[str, Sequence[Any]]]:
        while True:
            yield from self._loader

    def draw(self) -> Draw:
        """Read the next batch now, in the calling thread, and count it as trained on.

        For a caller that stores itself which prompts are not trained on yet.
        """
        assert self._next_draw is None, "a batch is already being read ahead"
        draw = self._draw()
        self.state = draw.state
        return draw

    async def next(self) -> Draw:
        """Return the next batch, read in a thread; without a sampler of the user, start to read the one after it.

        Raises:
            Exception: reading or tokenizing this batch failed. An error in a batch that is never requested is ignored.
        """
        draw = await (self._next_draw or self._read_ahead())
        self._next_draw = None if isinstance(self._loader, SampledDataLoader) else self._read_ahead()
        return draw

    def on_trained(self, batch: DataProto) -> None:
        """Update the sampler of the user with the batch of a training step; call it while no batch is being read.

        Args:
            batch: the batch that was trained on; `state` is the loader state after its prompts.
        """
        if isinstance(self._loader, SampledDataLoader):
            self.state = self.state._replace(loader=self._loader.on_trained(batch, self.state.loader["drawn"]))

    def _read_ahead(self) -> asyncio.Task[Draw]:
        task = asyncio.ensure_future(asyncio.to_thread(self._draw))
        # Retrieve the exception, so that asyncio does not report the error of a batch that is never requested.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _draw(self) -> Draw:
        batch = next(self._batches)
        self._draws += 1
        return Draw(to_rows(batch, self._draws), LoaderState(self._draws, self._loader.state_dict()))

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last draw that was trained on."""
        return max(0, self.state.draws - 1) // len(self._loader)

    def read(self, prompt: PromptId) -> dict[str, Any]:
        """Read one prompt again, without a sampler of the user; the loader state does not change."""
        assert isinstance(self._loader, EpochDataLoader), "partial rollouts exclude a sampler"
        return to_rows(self._loader.read(prompt.epoch, prompt.sample), prompt.number)[0]

    def restore(self, state: LoaderState) -> None:
        """Continue from a stored state.

        Raises:
            ValueError: the state belongs to other data; see the loader's `load_state_dict`.
        """
        assert self._next_draw is None, "call restore() before the first draw"
        self._loader.load_state_dict(state.loader)
        self._draws, self.state = state.draws, state
