"""Training prompts: drawn, put through the chat template and tokenised one batch ahead of their use.

A checkpoint holds what was trained on, not what was drawn: each draw knows the position behind it, and whoever trained
on a draw says so (`PromptSource.position`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from verl.utils.dataset.loader import EpochDataLoader


class Place(NamedTuple):
    """A point between two draws, fit for a checkpoint.

    Attributes:
        draws: how many came before it.
        loader: the data loader's state there.
    """

    draws: int
    loader: dict[str, int | bool]


class Draw(NamedTuple):
    """One batch of prompts.

    Attributes:
        rows: one dict a prompt, each with a `uid` of its own.
        behind: the place after this draw.
    """

    rows: list[dict[str, Any]]
    behind: Place


def rows_of(batch: Mapping[str, Sequence[Any]], number: int) -> list[dict[str, Any]]:
    """A collated batch as one dict a prompt; `uid` is made of `number`, that of the draw, and the prompt's place."""
    size = len(next(iter(batch.values())))
    return [{**{key: column[i] for key, column in batch.items()}, "uid": f"{number}.{i}"} for i in range(size)]


class PromptSource:
    """Batches of training prompts, epoch after epoch, without end.

    Args:
        loader: nobody else draws from it.

    Attributes:
        position: behind the last draw that was trained on, which is set from outside; where a resumed run goes on.
    """

    def __init__(self, loader: EpochDataLoader):
        self._loader = loader
        self._batches = self._passes()
        self._ahead: asyncio.Task[Draw] | None = None
        self._draws = 0
        self.position = Place(0, loader.state_dict())

    def _passes(self) -> Iterator[Mapping[str, Sequence[Any]]]:
        while True:
            yield from self._loader

    def draw(self) -> Draw:
        """The next batch, made here and now; it counts as trained on, for who keeps account of what was not."""
        assert self._ahead is None, "a batch is being drawn ahead"
        draw = self._draw()
        self.position = draw.behind
        return draw

    async def next(self) -> Draw:
        """The next batch; the one after it is made in a thread from now on.

        Raises:
            What reading or tokenising the batch raised; of a batch that nobody asks for, nothing.
        """
        draw = await (self._ahead or self._start())
        self._ahead = self._start()
        return draw

    def _start(self) -> asyncio.Task[Draw]:
        task = asyncio.ensure_future(asyncio.to_thread(self._draw))
        # Seen here, so that asyncio does not report the error of a batch that is never asked for.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def _draw(self) -> Draw:
        batch = next(self._batches)
        self._draws += 1
        return Draw(rows_of(batch, self._draws), Place(self._draws, self._loader.state_dict()))

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the last draw that was trained on."""
        return max(0, self.position.draws - 1) // len(self._loader)

    def read(self, number: int, epoch: int, sample: int) -> dict[str, Any]:
        """The row of draw `number`, of one prompt, that stands at a place of an epoch."""
        return rows_of(self._loader.read(epoch, sample), number)[0]

    def restore(self, place: Place) -> None:
        """Go to a place.

        Raises:
            ValueError: it belongs to other data; see `EpochDataLoader.load_state_dict`.
        """
        assert self._ahead is None, "before the first draw"
        self._loader.load_state_dict(place.loader)
        self._draws, self.position = place.draws, place
