"""A seeded data loader that resumes at the exact sample, also at the boundary between two epochs."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from verl.utils.dataset.rl_dataset import PromptDataset, collate_fn

_STATE_VERSION = 1
# Keys of the state that decide the order of the rows, and their names in error messages.
ORDER_KEYS = {
    "rows": "number of rows after filtering (data.train_files, data.max_prompt_length, ...)",
    "shuffle": "data.shuffle",
    "seed": "data.seed",
}


class EpochSampler(Sampler[int]):
    """The rows of one epoch, starting at a given sample; the order depends on (seed, epoch) only."""

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
        """Return all row numbers in the order of `epoch`, int64 [rows]."""
        if not self.shuffle:
            return np.arange(self.rows)
        # RandomState, unlike default_rng, guarantees the same stream in all NumPy releases; a checkpoint may be older.
        bits = np.random.MT19937(np.random.SeedSequence([self.seed, epoch]))
        return np.random.RandomState(bits).permutation(self.rows)


class EpochDataLoader(StatefulDataLoader):
    """A `StatefulDataLoader` whose state is the epoch and the number of samples delivered in it.

    One pass over the loader delivers the rest of the current epoch. After the last batch of an epoch the state is the
    start of the next epoch, even if the pass is not run to its end. (The state of StatefulDataLoader itself keeps the
    exhausted iterator at this point, so a resumed run skips an epoch.) The state does not depend on `num_workers`, and
    the batch size may change between saving and loading.

    After `break`, the next pass continues with the next batch. Only one pass is active: a new pass and
    `load_state_dict` end the previous one.
    """

    sampler: EpochSampler
    _pass = 0

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 0."""
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
                self._iterator = None  # ends the worker processes

    def _advance(self) -> None:
        self.sampler.start += self.batch_size
        self._start_next_epoch_if_done()

    def _start_next_epoch_if_done(self) -> None:
        left = self.sampler.rows - self.sampler.start
        if left < (self.batch_size if self.drop_last else 1):
            self.sampler.epoch += 1
            self.sampler.start = 0

    def read(self, epoch: int, sample: int) -> Any:
        """Return one prompt as a batch of one; the state of the loader does not change.

        Args:
            epoch: counted from 0.
            sample: number of the prompt in the order of the epoch, counted from 0.
        """
        return self.collate_fn([self.dataset[int(self.sampler.order(epoch)[sample])]])

    def state_dict(self) -> dict[str, int | bool]:
        """Return the state, values that JSON can hold; between two batches it describes the next batch."""
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
        """Continue at `state_dict`; this ends an active pass.

        Raises:
            ValueError: the state was saved with other data, another seed or another `data.shuffle`, so it would
                describe other prompts, or with a sampler of the user.
        """
        current = self.state_dict()
        if "sampler" in state_dict:
            raise ValueError(
                "cannot resume the data: the checkpoint was written with data.sampler.class_name="
                f"{state_dict['sampler']}; set data.sampler again, or start from the beginning with "
                "trainer.resume_mode=disable"
            )
        if state_dict.keys() != current.keys() or state_dict["version"] != _STATE_VERSION:
            raise ValueError(
                f"the state of the data loader has the keys {sorted(state_dict)}, expected {sorted(current)} (version "
                f"{_STATE_VERSION}): another program or version wrote it; use trainer.resume_mode=disable"
            )
        for key, name in ORDER_KEYS.items():
            if state_dict[key] != current[key]:
                raise ValueError(
                    f"cannot resume the data: {name}: {state_dict[key]} in the checkpoint, {current[key]} now; restore "
                    "the value of the checkpoint, or start from the beginning with trainer.resume_mode=disable"
                )
        self._pass += 1
        self._iterator = None
        self.sampler.epoch, self.sampler.start = state_dict["epoch"], state_dict["samples"]
        self._start_next_epoch_if_done()


def build_dataloader(
    dataset: PromptDataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int | None,
    drop_last: bool,
    num_workers: int = 0,
    collate: Callable[[list[Any]], Any] = collate_fn,
) -> EpochDataLoader:
    """Build a loader over `dataset`. Each epoch has its own order, which depends on (seed, epoch) only.

    Args:
        dataset: a map-style dataset with a length.
        batch_size: prompts per batch.
        shuffle: if False, every epoch has the order of the dataset.
        seed: not negative; None means 0.
        drop_last: skip the last, incomplete batch of an epoch.
        num_workers: processes that read and tokenize ahead; 0: in this process.
        collate: turns a list of items into a batch.

    Raises:
        ValueError: the data is smaller than one batch, or the seed is negative.
    """
    rows = len(dataset)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1 prompt")
    if rows < (batch_size if drop_last else 1):
        raise ValueError(
            f"the data has {rows} prompts, fewer than one batch of {batch_size}: set data.train_batch_size to at most "
            f"{rows}, or add data"
        )
    if seed is not None and seed < 0:
        raise ValueError(f"data.seed={seed}: must be 0 or more")
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
            # Without this, each pass draws from the global generator of torch, and a resumed process would differ.
            generator=torch.Generator().manual_seed(seed or 0),
        )
