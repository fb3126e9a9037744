"""Parts of the training loop that need no processes: saving."""

from types import SimpleNamespace

import pytest

from verl.config import PPOConfig
from verl.trainer.ppo.checkpoint import CheckpointError, CheckpointStore
from verl.trainer.ppo.ray_trainer import RayPPOTrainer


class Ranks:
    """Trainer ranks whose method `fails` raises an error."""

    def __init__(self, fails):
        self.fails = fails

    async def all(self, method, directory):
        if method.__name__ == self.fails:
            raise ValueError("rank 0 failed")


@pytest.fixture
def trainer(tmp_path):
    made = object.__new__(RayPPOTrainer)
    made.config, made.store, made.step = PPOConfig(), CheckpointStore(tmp_path), 4
    made.runtime = SimpleNamespace(
        processes=SimpleNamespace(trainers=Ranks("")),
        data=SimpleNamespace(prompts=SimpleNamespace(state=SimpleNamespace(loader={}, draws=4))),
        kl_controller=SimpleNamespace(value=0.1),
        sampler=SimpleNamespace(carried_prompts=list),
    )
    return made


class Log:
    def log(self, data, step, backend=None):
        self.step = step


async def test_a_failed_export_ends_the_run_after_the_resumable_part_is_published(trainer):
    trainer.runtime.processes.trainers = Ranks("export_hf")
    with pytest.raises(CheckpointError, match=r"checkpoint of step 4 was saved, but without .*rank 0 failed"):
        await trainer.save(Log())
    assert trainer.store.latest() == trainer.store.root.absolute() / "global_step_4"


async def test_a_failed_save_publishes_nothing(trainer):
    trainer.runtime.processes.trainers = Ranks("save_checkpoint")
    with pytest.raises(CheckpointError, match="was not saved: ValueError: rank 0 failed"):
        await trainer.save(Log())
    assert trainer.store.latest() is None
