"""The data of a run: steps and prompts with and without a sampler of the user."""

import pytest

from fixtures.run_files import with_overrides
from fixtures.tiny import write_tiny_model
from fixtures.training import write_data
from verl.trainer.ppo.data import load_data

# A curriculum as it is written for upstream verl.
CURRICULUM = """
from verl.experimental.dataset.sampler import AbstractCurriculumSampler
from verl.utils.dataset.rl_dataset import RLHFDataset


class Words(RLHFDataset):
    pass


class Repeat(AbstractCurriculumSampler):
    def __init__(self, data_source, data_config):
        assert type(data_source).__name__ == (data_config.get("custom_cls").get("name") or "RLHFDataset")
        self.source, self.first = data_source, data_source[0]["extra_info"]["index"]
        self.rows = data_config.sampler.get("rows", 12)

    def __iter__(self):
        while True:
            yield self.first

    def __len__(self):
        return self.rows

    def update(self, batch):
        self.first += int(batch)


class Keeps(Repeat):
    def state_dict(self):
        return {"first": self.first}

    def load_state_dict(self, state):
        self.first = state["first"]


class KeepsTooMuch(Keeps):
    def state_dict(self):
        return {"source": self.source}
"""


@pytest.fixture
def load(tmp_path):
    """A function that loads the data of a run of eight prompts with these overrides."""
    model = write_tiny_model(tmp_path / "model")
    train, val = (write_data(tmp_path / name, 8) for name in ("train.parquet", "val.parquet"))
    (tmp_path / "mine.py").write_text(CURRICULUM)

    def run(sampler=None, **keys):
        keys = {
            "data__train_files": train,
            "data__val_files": val,
            "data__train_batch_size": 2,
            "actor_rollout_ref__model__path": model,
            "trainer__total_epochs": 3,
        } | keys
        if sampler:
            keys |= {"data__sampler__class_path": tmp_path / "mine.py", "data__sampler__class_name": sampler}
        return load_data(with_overrides([f"{name.replace('__', '.')}={value}" for name, value in keys.items()]))

    return run


def indices(draw):
    return [row["index"] for row in draw.rows]


async def test_an_epoch_has_the_length_of_the_sampler(load):
    assert load().total_steps == 4 * 3
    assert load("Repeat").total_steps == 6 * 3
    assert load("Repeat", trainer__total_training_steps=5).total_steps == 5
    data = load("Repeat", data__sampler__kwargs="{rows: 4}")
    assert data.total_steps == 2 * 3
    assert len(data.val_loader) == 1 and [len(batch["index"]) for batch in data.val_loader] == [8]


async def test_an_update_changes_the_next_batch_and_nothing_is_read_ahead(load):
    prompts = load("Repeat").prompts
    epochs = []
    for step in range(8):
        draw = await prompts.next()
        assert indices(draw) == [step, step]
        assert [row["uid"] for row in draw.rows] == [f"{step + 1}.0", f"{step + 1}.1"]
        prompts.state = draw.state
        prompts.on_trained(1)
        epochs.append(prompts.epoch)
    assert epochs == [0, 0, 0, 0, 0, 0, 1, 1]


async def test_a_resumed_source_continues_after_the_updates(load):
    prompts = load("Keeps").prompts
    first, ahead = await prompts.next(), await prompts.next()
    prompts.state = first.state
    prompts.on_trained(3)
    resumed = load("Keeps").prompts
    resumed.restore(prompts.state)
    again = await resumed.next()
    assert indices(again) == indices(ahead) == [0, 0] and [row["uid"] for row in again.rows] == ["2.0", "2.1"]
    assert indices(await resumed.next()) == [3, 3]


async def test_the_sampler_gets_an_instance_of_the_users_dataset(load, tmp_path):
    data = load("Repeat", data__custom_cls__path=tmp_path / "mine.py", data__custom_cls__name="Words")
    assert indices(await data.prompts.next()) == [0, 0]


def test_a_curriculum_whose_progress_would_be_lost_is_reported_if_checkpoints_are_written(load, caplog):
    load("Repeat")
    load("Keeps", trainer__save_freq=1)
    assert not caplog.records
    load("Repeat", trainer__save_freq=1)
    (record,) = caplog.records
    assert "class_name=Repeat has no state_dict and load_state_dict" in record.getMessage()


def test_a_state_that_a_checkpoint_cannot_hold_is_refused_at_the_start(load):
    load("KeepsTooMuch")
    with pytest.raises(ValueError, match=r"class_name=KeepsTooMuch: .*state_dict \(it contains verl.*RLHFDataset\)"):
        load("KeepsTooMuch", trainer__save_freq=1)


def test_a_sampler_with_fewer_rows_than_a_batch_is_refused(load):
    with pytest.raises(ValueError, match=r"class_name=Repeat: its length is 1 rows, fewer than one batch of 2"):
        load("Repeat", data__sampler__kwargs="{rows: 1}")
