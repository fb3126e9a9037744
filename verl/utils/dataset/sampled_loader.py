"""A data loader in the order of the user's sampler, which takes rows only when they are needed and can be resumed."""

from __future__ import annotations

import copy
import itertools
import logging
import operator
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from verl.utils.dataset.rl_dataset import PromptDataset, collate_fn
from verl.utils.dataset.sampler import STATE_METHODS, AbstractCurriculumSampler, AbstractSampler

logger = logging.getLogger(__name__)

_STATE_VERSION = 1


class SampledDataLoader:
    """Batches of training prompts in the order of a sampler.

    A pass over the loader is a pass of the sampler; an incomplete batch at its end is dropped. After `break`, the next
    pass continues with the next batch.

    The state consists of the sampler's state and of the rows that were drawn but not trained on, which a resumed run
    draws first. It is taken between two training steps, after the sampler's `update`.

    Args:
        dataset: a map-style dataset with a length.
        sampler: a sampler of the dataset.
        batch_size: prompts per batch.
        collate: turns a list of items into a batch.

    Raises:
        ValueError: a pass of the sampler is smaller than one batch.
    """

    def __init__(
        self,
        dataset: PromptDataset,
        sampler: AbstractSampler,
        *,
        batch_size: int,
        collate: Callable[[list[Any]], Any] = collate_fn,
    ) -> None:
        self.rows_per_pass: int = len(sampler)  # type: ignore[arg-type]
        self._name = type(sampler).__name__
        if self.rows_per_pass < batch_size:
            raise ValueError(
                f"data.sampler.class_name={self._name}: its length is {self.rows_per_pass} rows, fewer than one batch "
                f"of {batch_size}; return at least {batch_size}, or lower data.train_batch_size or data.gen_batch_size"
            )
        self._dataset, self._sampler, self._batch_size, self._collate = dataset, sampler, batch_size, collate
        self._iterator: Iterator[int] | None = None
        # Lengths of the finished passes, and the number of rows taken in the current one.
        self._lengths: list[int] = []
        self._position = 0
        self._checksum = 0
        # Rows of an interrupted run that come before those of the sampler; rows drawn since the last `on_trained`.
        self._restored: deque[int] = deque()
        self._untrained: deque[int] = deque()
        self._drawn = 0
        self._warned = False

    def __len__(self) -> int:
        """Return the number of batches in a pass."""
        return self.rows_per_pass // self._batch_size

    def __iter__(self) -> Iterator[Any]:
        while (rows := self._next_rows()) is not None:
            self._untrained.extend(rows)
            self._drawn += len(rows)
            yield self._collate([self._dataset[row] for row in rows])

    def on_trained(self, batch: Any, drawn: int) -> dict[str, Any]:
        """Update a curriculum with the batch of a training step, and return the state after this step.

        Args:
            batch: the `DataProto` that was trained on.
            drawn: number of rows that were drawn until then, from `state_dict`.
        """
        if isinstance(self._sampler, AbstractCurriculumSampler):
            self._sampler.update(batch)
        while len(self._untrained) > self._drawn - drawn:
            self._untrained.popleft()
        return {**self.state_dict(), "drawn": drawn, **self._full_state()}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rows drawn so far; `on_trained` completes it to the state of a checkpoint."""
        return {"version": _STATE_VERSION, "drawn": self._drawn}

    def _full_state(self) -> dict[str, Any]:
        owner = next((kind for kind in ("sampler", "iterator") if _is_stateful(self._owner(kind))), None)
        return {
            "sampler": self._name,
            "rows": len(self._dataset),
            "pass_lengths": list(self._lengths),
            "position": self._position,
            "checksum": self._checksum,
            "untrained": [*self._untrained, *self._restored],
            "state_of": owner,
            "sampler_state": None if owner is None else copy.deepcopy(self._owner(owner).state_dict()),
        }

    def _owner(self, kind: str) -> Any:
        return self._sampler if kind == "sampler" else self._iterator

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a state of `on_trained`.

        Raises:
            ValueError: the state was saved with other data or another sampler.
        """
        if "sampler" not in state_dict or state_dict["version"] != _STATE_VERSION:
            raise ValueError(
                f"cannot resume the data: the checkpoint was written without data.sampler.class_name={self._name}, or "
                "by another version; leave out data.sampler, or start from the beginning with "
                "trainer.resume_mode=disable"
            )
        names = {"sampler": "data.sampler.class_name", "rows": "number of rows after filtering (data.train_files, ...)"}
        for key, present in (("sampler", self._name), ("rows", len(self._dataset))):
            if state_dict[key] != present:
                raise ValueError(
                    f"cannot resume the data: {names[key]}: {state_dict[key]} in the checkpoint, {present} now; "
                    "restore the value of the checkpoint, or start from the beginning with trainer.resume_mode=disable"
                )
        self._drawn = state_dict["drawn"]
        self._restored, self._untrained = deque(state_dict["untrained"]), deque()
        self._lengths, self._position = list(state_dict["pass_lengths"]), state_dict["position"]
        self._checksum, self._iterator = state_dict["checksum"], None
        owner = state_dict["state_of"]
        if owner is None:
            self._replay()
            return
        if owner == "iterator":
            self._iterator = iter(self._sampler)
        if not _is_stateful(self._owner(owner)):
            raise ValueError(
                f"cannot resume the data: the checkpoint holds a state of data.sampler.class_name={self._name}, which "
                "has no state_dict and load_state_dict now; restore them, or use trainer.resume_mode=disable"
            )
        self._owner(owner).load_state_dict(state_dict["sampler_state"])

    def _replay(self) -> None:
        """Go through the rows before the state again, for a sampler without a state; warn if they differ."""
        checksum = 0
        for length in self._lengths:
            # One more than the length, so that the code behind the last `yield` runs.
            for row in itertools.islice(self._sampler, length + 1):
                checksum = _add(checksum, self._checked(row))
        self._iterator = iter(self._sampler)
        for row in itertools.islice(self._iterator, self._position):
            checksum = _add(checksum, self._checked(row))
        if checksum != self._checksum:
            logger.warning(
                "data.sampler.class_name=%s: the rows before the checkpoint differ when they are sampled again, "
                "because they depend on updates or on global random numbers; the resumed run continues with "
                "other prompts than an uninterrupted one. Define state_dict and load_state_dict to resume exactly",
                self._name,
            )

    def _next_rows(self) -> list[int] | None:
        """Return the rows of the next batch; None at the end of a pass."""
        rows = [self._restored.popleft() for _ in range(min(self._batch_size, len(self._restored)))]
        while len(rows) < self._batch_size:
            if self._iterator is None:
                self._iterator = iter(self._sampler)
            try:
                row = self._checked(next(self._iterator))
            except StopIteration:
                self._end_pass()
                return None
            self._position += 1
            self._checksum = _add(self._checksum, row)
            rows.append(row)
        return rows

    def _end_pass(self) -> None:
        length, self._position, self._iterator = self._position, 0, None
        self._lengths.append(length)
        if length < self._batch_size:
            raise ValueError(
                f"data.sampler.class_name={self._name}: a pass has {length} rows, fewer than one batch of "
                f"{self._batch_size}; yield at least {self._batch_size} rows"
            )
        if length < self.rows_per_pass and not self._warned:
            self._warned = True
            logger.warning(
                "data.sampler.class_name=%s: a pass has %d rows, but its length is %d; the number of training steps "
                "follows from the length",
                self._name,
                length,
                self.rows_per_pass,
            )

    def _checked(self, row: Any) -> int:
        """Return a row number of the sampler as an int; ValueError if the dataset has no such row."""
        rows = len(self._dataset)
        try:
            number = operator.index(row)
        except TypeError:
            number = -1
        if not 0 <= number < rows:
            raise ValueError(
                f"data.sampler.class_name={self._name}: __iter__ yields {row!r:.80}; it must yield numbers of rows, "
                f"from 0 to {rows - 1}"
            )
        return number


def _add(checksum: int, row: int) -> int:
    return zlib.crc32(row.to_bytes(8, "little"), checksum)


def _is_stateful(owner: Any) -> bool:
    return all(callable(getattr(owner, name, None)) for name in STATE_METHODS)
