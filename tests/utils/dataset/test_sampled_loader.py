"""Batches in the order of a user's sampler: passes, updates between batches, and exact resumption."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader.sampler import RandomSampler

from verl.utils.dataset.loader import build_dataloader
from verl.utils.dataset.sampled_loader import SampledDataLoader
from verl.utils.dataset.sampler import AbstractCurriculumSampler, AbstractSampler


class Rows:
    """Row i is {"row": i}."""

    def __init__(self, rows=10):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        assert type(index) is int
        return {"row": index}


class Given(AbstractSampler):
    """Yields the given rows in each pass."""

    def __init__(self, rows, length=None):
        self.rows, self.length = rows, len(rows) if length is None else length

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return self.length


class Shuffled(AbstractSampler):
    """Each pass has its own order, from one generator; it has no state_dict."""

    def __init__(self, data_source=range(10), data_config=None):
        self.rows, self.random, self.finished = len(data_source), random.Random(3), 0

    def __iter__(self):
        yield from self.random.sample(range(self.rows), self.rows)
        self.finished += 1

    def __len__(self):
        return self.rows


class Iterator(AbstractSampler):
    """Returns torchdata's iterator, which has a state_dict."""

    def __init__(self):
        self.sampler = RandomSampler(range(10), generator=torch.Generator().manual_seed(4))

    def __iter__(self):
        return iter(self.sampler)

    def __len__(self):
        return 10


class Weakest(AbstractCurriculumSampler):
    """Always yields the row that was seen least, ties by score; learns from each batch, and keeps its state."""

    def __init__(self, rows=10):
        self.rows, self.seen, self.score = rows, np.zeros(rows, np.int64), {}

    def __iter__(self):
        while True:
            row = min(range(self.rows), key=lambda row: (self.seen[row], self.score.get(row, 0.0), row))
            self.seen[row] += 1
            yield np.int64(row)

    def __len__(self):
        return self.rows

    def update(self, batch):
        for row in batch:
            self.score[row] = self.score.get(row, 0.0) + (row * 7) % 5 + 0.5

    def state_dict(self):
        return {"seen": self.seen, "score": self.score}

    def load_state_dict(self, state):
        self.seen, self.score = state["seen"], state["score"]


class Forgetful(Weakest):
    """The same without a state."""

    state_dict = load_state_dict = None


def loader(sampler, batch_size=3, rows=10):
    return SampledDataLoader(Rows(rows), sampler, batch_size=batch_size)


def endless(source):
    while True:
        for batch in source:
            yield batch["row"].tolist()


def stored(state):
    """The state after a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class Training:
    """Trains on batches; `ahead` batches are drawn before the one that is trained on, as with a lag.

    Records the batches that were trained on, and the state after each of them.
    """

    def __init__(self, source, ahead=0, state=None):
        self.source, self.ahead = source, ahead
        if state is not None:
            source.load_state_dict(stored(state))
        self.batches = endless(source)
        self.drawn, self.trained, self.state = [], [], state

    def step(self):
        while len(self.drawn) <= self.ahead:
            rows = next(self.batches)
            self.drawn.append((rows, self.source.state_dict()))
        rows, state = self.drawn.pop(0)
        self.state = self.source.on_trained(rows, state["drawn"])
        self.trained.append(rows)

    def run(self, steps):
        for _ in range(steps):
            self.step()
        return self.trained


def test_batches_follow_the_sampler_in_every_pass():
    source = loader(Given([7, 7, 0, 9, 3, 2, 1]))
    assert len(source) == 2 and source.rows_per_pass == 7
    assert list(itertools.islice(endless(source), 4)) == [[7, 7, 0], [9, 3, 2]] * 2


def test_every_pass_asks_the_sampler_again():
    sampler = Shuffled()
    got = list(itertools.islice(endless(loader(sampler, batch_size=5)), 6))
    expected = random.Random(3)
    passes = [expected.sample(range(10), 10) for _ in range(3)]
    assert got == [order[start : start + 5] for order in passes for start in (0, 5)]
    assert sampler.finished == 2, "the third pass has not ended"


def test_rows_are_taken_only_when_a_batch_is_drawn():
    """An update decides about the batch that follows it."""
    sampler = Weakest(4)
    training = Training(loader(sampler, batch_size=2, rows=4))
    assert training.run(2) == [[0, 1], [2, 3]]
    assert sampler.score == {0: 0.5, 1: 2.5, 2: 4.5, 3: 1.5}
    assert training.run(2)[2:] == [[0, 3], [1, 2]]
    assert sampler.seen.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("make", [Shuffled, Iterator, Weakest, lambda: Given(list(range(10)))])
def test_a_resumed_run_trains_on_the_same_batches(make, ahead, caplog):
    """With and without a state_dict, of the sampler or of its iterator, at each step of several passes."""
    expected = Training(loader(make()), ahead).run(12)
    for steps in range(1, 9):
        before = Training(loader(make()), ahead)
        before.run(steps)
        after = Training(loader(make()), ahead, before.state)
        assert after.run(4) == expected[steps : steps + 4], steps
    assert not caplog.records


def test_several_interruptions_equal_an_uninterrupted_run():
    expected = Training(loader(Weakest()), 1).run(12)
    state, got = None, []
    while len(got) < 12:
        training = Training(loader(Weakest()), 1, state)
        got += training.run(3)
        state = training.state
    assert got == expected


def test_a_resumed_run_may_have_another_batch_size():
    before = Training(loader(Given(list(range(10)) * 3)), 1)
    before.run(2)
    after = Training(loader(Given(list(range(10)) * 3), batch_size=4), 1, before.state)
    assert after.run(2) == [[6, 7, 8, 9], [0, 1, 2, 3]]


def test_a_state_is_a_copy():
    training = Training(loader(Weakest()))
    training.run(1)
    state, before = training.state, stored(training.state)
    training.run(3)
    assert state["sampler_state"]["seen"].tolist() == before["sampler_state"]["seen"].tolist() != [0] * 10
    assert state["sampler_state"]["score"] == before["sampler_state"]["score"]


def test_rows_that_cannot_be_sampled_again_are_reported(caplog):
    before = Training(loader(Forgetful()))
    before.run(5)
    after = Training(loader(Forgetful()), 0, before.state)
    after.run(1)
    (record,) = caplog.records
    assert "data.sampler.class_name=Forgetful: the rows before the checkpoint differ" in record.getMessage()
    assert "Define state_dict and load_state_dict" in record.getMessage()


def test_a_short_pass_is_reported_once(caplog):
    source = loader(Given([0, 1, 2, 3], length=9))
    assert list(itertools.islice(endless(source), 3)) == [[0, 1, 2]] * 3
    (record,) = caplog.records
    assert "Given: a pass has 4 rows, but its length is 9" in record.getMessage()


def test_passes_without_a_batch_are_an_error():
    with pytest.raises(ValueError, match=r"class_name=Given: its length is 2 rows, fewer than one batch of 3"):
        loader(Given([0, 1]))
    with pytest.raises(ValueError, match=r"class_name=Given: a pass has 2 rows, fewer than one batch of 3"):
        next(endless(loader(Given([0, 1], length=3))))


@pytest.mark.parametrize("row", [10, -1, 1.5, [1, 2], "3", None, 10**30])
def test_a_row_that_does_not_exist_is_an_error(row):
    with pytest.raises(ValueError, match=r"class_name=Given: __iter__ yields .*numbers of rows, from 0 to 9"):
        next(endless(loader(Given([0, 1, row]))))


@pytest.mark.parametrize("row", [3, np.int64(3), torch.tensor(3), np.uint8(3)])
def test_whole_numbers_of_any_type_are_rows(row):
    assert next(endless(loader(Given([0, 1, row])))) == [0, 1, 3]


def test_a_state_of_other_data_or_another_sampler_is_refused():
    training = Training(loader(Weakest()))
    training.run(1)
    with pytest.raises(ValueError, match=r"number of rows .*: 10 in the checkpoint, 12 now"):
        loader(Weakest(), rows=12).load_state_dict(training.state)
    with pytest.raises(ValueError, match=r"data\.sampler\.class_name: Weakest in the checkpoint, Shuffled now"):
        loader(Shuffled()).load_state_dict(training.state)
    changed = type("Weakest", (Forgetful,), {})
    with pytest.raises(ValueError, match=r"a state of data\.sampler\.class_name=Weakest, which has no state_dict"):
        loader(changed()).load_state_dict(training.state)


def test_a_checkpoint_with_and_one_without_a_sampler_are_told_apart():
    training = Training(loader(Weakest()))
    training.run(1)
    plain = build_dataloader(Rows(), batch_size=3, shuffle=True, seed=5, drop_last=True)
    with pytest.raises(ValueError, match=r"written with data\.sampler\.class_name=Weakest; set data\.sampler again"):
        plain.load_state_dict(training.state)
    with pytest.raises(ValueError, match=r"written without data\.sampler\.class_name=Weakest"):
        loader(Weakest()).load_state_dict(plain.state_dict())
