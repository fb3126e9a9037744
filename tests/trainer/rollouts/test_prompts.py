"""Prompts drawn ahead: made in a thread, and not yet consumed as far as a checkpoint is concerned."""

import asyncio
import json
import threading

import pytest
from torch.utils.data import Dataset

from verl.trainer.rollouts.prompts import Place, PromptSource
from verl.utils.dataset.loader import build_dataloader


class Rows(Dataset):
    """Row i is {"index": i}; notes which thread reads what, and fails at row `bad`."""

    def __init__(self, rows=11, bad=None):
        self.rows, self.bad = rows, bad
        self.read = []
        self.many = threading.Event()

    def __len__(self):
        return self.rows

    def __getitem__(self, item):
        if item == self.bad:
            raise ValueError(f"row {item} has no prompt")
        self.read.append((int(item), threading.current_thread()))
        if len(self.read) == 6:
            self.many.set()
        return {"index": int(item)}


def source(rows=11, batch_size=3, shuffle=True, bad=None):
    data = Rows(rows, bad)
    return PromptSource(build_dataloader(data, batch_size=batch_size, shuffle=shuffle, seed=5, drop_last=True)), data


def indices(draw):
    return [row["index"] for row in draw.rows]


async def test_the_next_batch_is_made_in_a_thread_before_it_is_asked_for():
    prompts, data = source()
    first = await prompts.next()
    assert await asyncio.to_thread(data.many.wait, 60), "the second batch was not made"
    ahead = data.read[3:6]
    assert all(thread is not threading.main_thread() for _, thread in ahead)
    second = await prompts.next()
    assert indices(second) == [index for index, _ in ahead]
    assert [row["uid"] for row in (*first.rows, *second.rows)] == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]


@pytest.mark.parametrize("in_flight", [0, 1, 2])
async def test_a_checkpoint_goes_on_behind_what_was_trained_on(in_flight):
    """Three batches an epoch; a checkpoint after each of seven steps, with so many further batches handed out."""
    whole, _ = source()
    expected = [await whole.next() for _ in range(12)]
    assert len({tuple(indices(draw)) for draw in expected}) == 12, "epochs differ"
    for trained in range(8):
        broken, _ = source()
        draws = [await broken.next() for _ in range(trained + in_flight)]
        if trained:
            broken.position = draws[trained - 1].behind
        saved = Place(*json.loads(json.dumps(broken.position)))
        resumed, _ = source()
        resumed.restore(saved)
        again = [await resumed.next() for _ in range(4)]
        assert [draw.rows for draw in again] == [draw.rows for draw in expected[trained : trained + 4]]
        assert resumed.position == saved, "nothing was trained on yet"


async def test_epochs_count_what_was_trained_on():
    prompts, _ = source()
    seen = [prompts.epoch]
    for _ in range(7):
        prompts.position = (await prompts.next()).behind
        seen.append(prompts.epoch)
    assert seen == [0, 0, 0, 0, 1, 1, 1, 2]


async def test_an_error_shows_when_its_batch_is_asked_for(caplog):
    prompts, _ = source(rows=9, shuffle=False, bad=7)
    await prompts.next()
    assert indices(await prompts.next()) == [3, 4, 5]
    with pytest.raises(ValueError, match="row 7 has no prompt"):
        await prompts.next()


async def test_an_error_of_a_batch_that_nobody_needs_is_no_error():
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    prompts, _ = source(rows=9, shuffle=False, bad=4)
    await prompts.next()
    ahead = prompts._ahead
    await asyncio.wait([ahead])
    assert isinstance(ahead.exception(), ValueError)
    del prompts, ahead
    assert not reported


def test_a_draw_made_at_once_counts_as_trained_on():
    prompts, _ = source()
    draws = [prompts.draw() for _ in range(4)]
    assert prompts.position == draws[-1].behind and prompts.position.draws == 4
    row = prompts.read(9, epoch=0, sample=1)
    assert row == {"index": indices(draws[0])[1], "uid": "9.0"}
