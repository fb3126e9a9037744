"""A seeded loader that resumes exactly where it was, at the boundary between two epochs too."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from verl.utils.dataset.rl_dataset import collate_fn

_STATE_VERSION = 1


class EpochSampler(Sampler[int]):
    """The rows of one epoch from a given sample on; the order is a function of (seed, epoch) only."""

    def __init__(self, rows: int, *, shuffle: bool, seed: int) -> None:
        self.rows = rows
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.start = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch)[self.start :].tolist())

    def order(self, epoch: int) -> np.ndarray:
        """All row numbers in the order of `epoch`, int64 [rows]."""
        if not self.shuffle:
            return np.arange(self.rows)
        # RandomState, unlike default_rng, promises the same stream in every NumPy release: a checkpoint may outlive one
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.rows)


class EpochDataLoader(StatefulDataLoader):
    """A `StatefulDataLoader` whose state is a position: the epoch and the number of samples delivered in it.

    One pass over the loader is the rest of the current epoch. Once the last batch of an epoch is delivered the position
    is the start of the next epoch, whether or not the pass is run to its end. (StatefulDataLoader's own state keeps the
    exhausted iterator there, and a resumed run then skips an epoch.) The state does not depend on `num_workers`, and
    the batch size may change between saving and loading.

    A pass that is left early (`break`) goes on where it was with the next pass. Only one pass is alive: a new one, and
    `load_state_dict`, end the one before.
    """

    sampler: EpochSampler
    _pass = 0

    @property
    def epoch(self) -> int:
        """The epoch, from 0, of the batch that comes next."""
        return self.sampler.epoch

    def __iter__(self) -> Iterator[Any]:
        self._pass += 1
        current, epoch = self._pass, self.sampler.epoch
        try:
            for batch in super().__iter__():
                self._advance()
                yield batch
                if self._pass != current or self.sampler.epoch != epoch:
                    return
        finally:
            if self._pass == current:
                self._iterator = None  # lets go of worker processes

    def _advance(self) -> None:
        self.sampler.start += self.batch_size
        self._normalise()

    def _normalise(self) -> None:
        left = self.sampler.rows - self.sampler.start
        if left < (self.batch_size if self.drop_last else 1):
            self.sampler.epoch += 1
            self.sampler.start = 0

    def read(self, epoch: int, sample: int) -> Any:
        """The prompt at a position as a batch of one; the loader stays where it is."""
        return self.collate_fn([self.dataset[int(self.sampler.order(epoch)[sample])]])

    def state_dict(self) -> dict[str, int | bool]:
        """Plain numbers, fit for JSON; taken between two batches, it stands for the batch that comes next."""
        sampler = self.sampler
        return {
            "version": _STATE_VERSION,
            "epoch": sampler.epoch,
            "samples": sampler.start,
            "rows": sampler.rows,
            "shuffle": sampler.shuffle,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the position of `state_dict`; ends a pass that is under way.

        Raises:
            ValueError: the state belongs to other data, another seed or another order, so that its position would mean
                other prompts.
        """
        current = self.state_dict()
        if state_dict.keys() != current.keys() or state_dict["version"] != _STATE_VERSION:
            raise ValueError(
                f"the data loader's state has the keys {sorted(state_dict)}, expected {sorted(current)} (version "
                f"{_STATE_VERSION}); it was written by something else: use trainer.resume_mode=disable"
            )
        names = {
            "rows": "rows that are left after filtering (data.train_files, data.max_prompt_length, ...)",
            "shuffle": "data.shuffle",
            "seed": "data.seed",
        }
        for key, name in names.items():
            if state_dict[key] != current[key]:
                raise ValueError(
                    f"cannot resume the data: {name}: {state_dict[key]} in the checkpoint, {current[key]} now; set it "
                    "as it was, or start anew with trainer.resume_mode=disable"
                )
        self._pass += 1
        self._iterator = None
        self.sampler.epoch, self.sampler.start = state_dict["epoch"], state_dict["samples"]
        self._normalise()


def build_dataloader(
    dataset: Dataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    drop_last: bool,
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] = collate_fn,
) -> EpochDataLoader:
    """A loader over `dataset` whose every epoch has an order of its own, the same for the same (seed, epoch).

    Args:
        batch_size: prompts a batch.
        seed: non-negative; None means 0.
        drop_last: leave out the last, short batch of an epoch.
        num_workers: processes that read and tokenise ahead; 0 does it in this process.

    Raises:
        ValueError: no batch at all, or a negative seed.
        NotImplementedError: the dataset keeps a state of its own, which the position would not cover.
    """
    rows = len(dataset)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: has to be at least 1 prompt")
    if rows < (batch_size if drop_last else 1):
        raise ValueError(
            f"the data has {rows} prompts, fewer than one batch of {batch_size}: set data.train_batch_size to at most "
            f"{rows}, or give more data"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"data.seed={seed}: has to be 0 or more")
    if hasattr(dataset, "state_dict"):
        raise NotImplementedError(
            f"the dataset class {type(dataset).__name__} has a state_dict; only datasets whose items depend on the "
            "index alone can be resumed: remove it"
        )
    sampler = EpochSampler(rows, shuffle=shuffle, seed=seed or 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
        return EpochDataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=num_workers,
            collate_fn=collate,
            # without its own, each pass draws from torch's global generator: a resumed process would differ
            generator=torch.Generator().manual_seed(seed or 0),
        )
