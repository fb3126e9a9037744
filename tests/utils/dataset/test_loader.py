"""The loader: seeded orders, and a resumed run that reads the same prompts as an uninterrupted run."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from verl.utils.dataset.loader import build_dataloader


class Numbers(Dataset):
    """Row i is {"index": i, "pid": the process that read it}."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, item: int) -> dict:
        return {"index": int(item), "pid": os.getpid()}


EPOCHS = 3


def loader(rows=11, batch_size=3, shuffle=True, seed=5, drop_last=True, num_workers=0):
    return build_dataloader(
        Numbers(rows),
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        num_workers=num_workers,
    )


def stream(source, upto=EPOCHS):
    """(epoch, rows) of every batch, as in a training loop; the loop counts `epoch`, not the loader."""
    for epoch in range(source.epoch, upto):
        for batch in source:
            yield epoch, batch["index"].tolist()


def test_loader_is_a_stateful_dataloader_with_object_columns():
    source = loader()
    assert isinstance(source, StatefulDataLoader)
    batch = next(iter(source))
    assert set(batch) == {"index", "pid"} and batch["index"].dtype == object and batch["index"].shape == (3,)


@pytest.mark.parametrize(
    ("rows", "drop_last", "sizes"), [(11, True, [3, 3, 3]), (11, False, [3, 3, 3, 2]), (9, False, [3] * 3)]
)
def test_epoch_has_every_row_at_most_once(rows, drop_last, sizes):
    source = loader(rows=rows, drop_last=drop_last)
    assert len(source) == len(sizes)
    for _, batches in itertools.groupby(stream(source), key=lambda pair: pair[0]):
        batches = [indices for _, indices in batches]
        assert [len(batch) for batch in batches] == sizes
        seen = list(itertools.chain(*batches))
        assert len(set(seen)) == len(seen) == sum(sizes) and set(seen) <= set(range(rows))


def test_orders_depend_on_the_seed_and_the_epoch_only():
    first, again, other = (list(stream(loader(rows=32, batch_size=8, seed=seed))) for seed in (1, 1, 2))
    assert first == again and first != other
    orders = [[row for e, rows in first if e == epoch for row in rows] for epoch in range(EPOCHS)]
    assert len({tuple(order) for order in orders}) == EPOCHS
    torch.manual_seed(123)
    np.random.seed(7)
    assert list(stream(loader(rows=32, batch_size=8, seed=1))) == first
    assert list(stream(loader(seed=None))) == list(stream(loader(seed=0)))
    unshuffled = list(stream(loader(rows=6, shuffle=False)))
    assert unshuffled == [(epoch, rows) for epoch in range(EPOCHS) for rows in ([0, 1, 2], [3, 4, 5])]


def test_order_of_a_seed_is_fixed():
    """A checkpoint must describe the same prompts in the next release."""
    assert loader(rows=8, seed=1).sampler.order(0).tolist() == [1, 6, 0, 3, 7, 4, 2, 5]
    assert loader(rows=8, seed=1).sampler.order(1).tolist() == [3, 2, 4, 0, 7, 1, 5, 6]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rows", "drop_last"), [(11, True), (11, False), (9, True), (9, False)])
def test_run_resumed_after_any_batch_equals_an_uninterrupted_run(rows, drop_last, shuffle):
    whole = list(stream(loader(rows=rows, drop_last=drop_last, shuffle=shuffle)))
    assert len(whole) == EPOCHS * len(loader(rows=rows, drop_last=drop_last))
    for cut in range(len(whole) + 1):
        before = loader(rows=rows, drop_last=drop_last, shuffle=shuffle)
        head = list(itertools.islice(stream(before), cut))
        state = json.loads(json.dumps(before.state_dict()))
        after = loader(rows=rows, drop_last=drop_last, shuffle=shuffle)
        after.load_state_dict(state)
        assert head + list(stream(after)) == whole, f"cut after {cut} batches"


def test_state_at_an_epoch_boundary_is_the_start_of_the_next_epoch():
    before = loader()
    batches = iter(before)
    for _ in range(len(before)):
        next(batches)
    at_the_last_batch = before.state_dict()
    assert list(batches) == []  # the pass ends here
    assert before.state_dict() == at_the_last_batch
    assert at_the_last_batch["epoch"] == 1 and at_the_last_batch["samples"] == 0
    assert before.epoch == 1


def test_several_interruptions_equal_an_uninterrupted_run():
    whole = list(stream(loader()))
    seen, state = [], None
    while len(seen) < len(whole):
        source = loader()
        if state is not None:
            source.load_state_dict(state)
        seen += list(itertools.islice(stream(source), 2))
        state = source.state_dict()
    assert seen[: len(whole)] == whole


@pytest.mark.parametrize("workers", [(1, 0), (0, 1), (2, 2)])
def test_state_counts_delivered_batches_while_workers_read_ahead(workers):
    whole = list(stream(loader(), upto=2))
    for cut in (1, 3, 4):
        before = loader(num_workers=workers[0])
        head = list(itertools.islice(stream(before, upto=2), cut))
        after = loader(num_workers=workers[1])
        after.load_state_dict(before.state_dict())
        assert head + list(stream(after, upto=2)) == whole, f"cut after {cut} batches"
    if workers[0]:
        assert os.getpid() not in next(iter(loader(num_workers=workers[0])))["pid"]


def test_next_pass_continues_after_a_break():
    source, whole = loader(), list(stream(loader()))
    for batch in source:
        first = batch["index"].tolist()
        break
    assert [(0, first), *stream(source)] == whole


def test_load_state_dict_ends_the_active_pass():
    source, whole = loader(), list(stream(loader()))
    state = source.state_dict()
    batches = iter(source)
    next(batches)
    source.load_state_dict(state)
    assert list(batches) == []
    assert list(stream(source)) == whole


def test_batch_size_may_change_on_resume():
    before = loader(rows=12, batch_size=3)
    head = [rows for _, rows in itertools.islice(stream(before), 2)]
    after = loader(rows=12, batch_size=2)
    after.load_state_dict(before.state_dict())
    rest = [rows for _, rows in stream(after, upto=1)]
    assert list(itertools.chain(*head, *rest)) == loader(rows=12).sampler.order(0).tolist()
    too_large = loader(rows=12, batch_size=7)
    too_large.load_state_dict(before.state_dict())  # six rows are left, fewer than a batch
    assert too_large.epoch == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": 12}, r"number of rows after filtering .*: 11 in the checkpoint, 12 now"),
        ({"seed": 6}, r"data\.seed: 5 in the checkpoint, 6 now"),
        ({"shuffle": False}, r"data\.shuffle: True in the checkpoint, False now"),
    ],
)
def test_state_of_other_data_is_an_error(change, words):
    with pytest.raises(ValueError, match=words) as error:
        loader(**change).load_state_dict(loader().state_dict())
    assert "trainer.resume_mode=disable" in str(error.value)
    with pytest.raises(ValueError, match="another program or version wrote it"):
        loader().load_state_dict({"_num_yielded": 3})


def test_loader_does_not_change_the_global_random_state():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(stream(loader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_invalid_arguments_are_errors():
    with pytest.raises(
        ValueError, match=r"11 prompts, fewer than one batch of 12: set data\.train_batch_size to at most 11"
    ):
        loader(batch_size=12)
    assert len(loader(batch_size=12, drop_last=False)) == 1
    with pytest.raises(ValueError, match="batch_size=0"):
        loader(batch_size=0)
    with pytest.raises(ValueError, match=r"data\.seed=-1"):
        loader(seed=-1)


def test_read_returns_an_earlier_prompt_and_keeps_the_state():
    source, seen = loader(batch_size=1), []
    batches = (batch for _ in range(EPOCHS) for batch in source)
    for _ in range(15):
        here = source.state_dict()
        seen.append((here["epoch"], here["samples"], next(batches)["index"].tolist()))
    assert seen[-1][0] == 1, "the batches do not reach a second epoch"
    fresh = loader(batch_size=4)
    fresh.load_state_dict(source.state_dict())
    before = fresh.state_dict()
    for epoch, sample, index in seen:
        batch = fresh.read(epoch, sample)
        assert batch["index"].tolist() == index and batch["index"].dtype == object
    assert fresh.state_dict() == before
