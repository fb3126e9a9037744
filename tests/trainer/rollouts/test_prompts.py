"""Prompts read ahead: read in a thread, and not counted as consumed in a checkpoint."""

import asyncio
import json
import threading

import pytest
from torch.utils.data import Dataset

from verl.trainer.rollouts.prompts import LoaderState, PromptId, PromptSource
from verl.utils.dataset.loader import build_dataloader


class Rows(Dataset):
    """Row i is {"index": i}. Records which thread reads each row, and fails at row `bad`."""

    def __init__(self, rows=11, bad=None):
        self.rows, self.bad = rows, bad
        self.read = []
        self.six_rows_read = threading.Event()

    def __len__(self):
        return self.rows

    def __getitem__(self, item):
        if item == self.bad:
            raise ValueError(f"row {item} has no prompt")
        self.read.append((int(item), threading.current_thread()))
        if len(self.read) == 6:
            self.six_rows_read.set()
        return {"index": int(item)}


def source(rows=11, batch_size=3, shuffle=True, bad=None):
    data = Rows(rows, bad)
    return PromptSource(build_dataloader(data, batch_size=batch_size, shuffle=shuffle, seed=5, drop_last=True)), data


def indices(draw):
    return [row["index"] for row in draw.rows]


async def test_the_next_batch_is_read_in_a_thread_before_it_is_requested():
    prompts, data = source()
    first = await prompts.next()
    assert await asyncio.to_thread(data.six_rows_read.wait, 60), "the second batch was not read"
    ahead = data.read[3:6]
    assert all(thread is not threading.main_thread() for _, thread in ahead)
    second = await prompts.next()
    assert indices(second) == [index for index, _ in ahead]
    assert [row["uid"] for row in (*first.rows, *second.rows)] == ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2"]


@pytest.mark.parametrize("in_flight", [0, 1, 2])
async def test_a_resumed_source_continues_after_the_last_trained_draw(in_flight):
    """Three batches per epoch; a checkpoint after each of seven steps, with `in_flight` further batches drawn."""
    uninterrupted, _ = source()
    expected = [await uninterrupted.next() for _ in range(12)]
    assert len({tuple(indices(draw)) for draw in expected}) == 12, "epochs differ"
    for trained in range(8):
        interrupted, _ = source()
        draws = [await interrupted.next() for _ in range(trained + in_flight)]
        if trained:
            interrupted.state = draws[trained - 1].state
        saved = LoaderState(*json.loads(json.dumps(interrupted.state)))
        resumed, _ = source()
        resumed.restore(saved)
        again = [await resumed.next() for _ in range(4)]
        assert [draw.rows for draw in again] == [draw.rows for draw in expected[trained : trained + 4]]
        assert resumed.state == saved, "nothing was trained on yet"


async def test_the_epoch_counts_trained_draws():
    prompts, _ = source()
    epochs = [prompts.epoch]
    for _ in range(7):
        prompts.state = (await prompts.next()).state
        epochs.append(prompts.epoch)
    assert epochs == [0, 0, 0, 0, 1, 1, 1, 2]


async def test_an_error_is_raised_when_its_batch_is_requested(caplog):
    prompts, _ = source(rows=9, shuffle=False, bad=7)
    await prompts.next()
    assert indices(await prompts.next()) == [3, 4, 5]
    with pytest.raises(ValueError, match="row 7 has no prompt"):
        await prompts.next()


async def test_an_error_in_a_batch_that_is_never_requested_is_ignored():
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    prompts, _ = source(rows=9, shuffle=False, bad=4)
    await prompts.next()
    ahead = prompts._next_draw
    await asyncio.wait([ahead])
    assert isinstance(ahead.exception(), ValueError)
    del prompts, ahead
    assert not reported


def test_a_synchronous_draw_counts_as_trained_on():
    prompts, _ = source()
    draws = [prompts.draw() for _ in range(4)]
    assert prompts.state == draws[-1].state and prompts.state.draws == 4
    row = prompts.read(PromptId(9, epoch=0, sample=1))
    assert row == {"index": indices(draws[0])[1], "uid": "9.0"}
