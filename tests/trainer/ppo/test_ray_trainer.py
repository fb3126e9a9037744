"""Parts of the training loop that need no processes: saving, and the logs of a validation."""

from types import SimpleNamespace

import pytest

from verl.config import PPOConfig
from verl.config.quantization_guard import QuantizationGuardConfig
from verl.preflight.inputs import RunInputs
from verl.trainer.ppo.checkpoint import CheckpointError, CheckpointStore
from verl.trainer.ppo.quantization_guard import QuantizationGuard, QuantizationGuardError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.tracking.jsonl import read_steps


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
        config=made.config,
        inputs=RunInputs({}, {}, "", {}),
        data=SimpleNamespace(total_steps=9, prompts=SimpleNamespace(state=SimpleNamespace(loader={}, draws=4))),
        kl_controller=SimpleNamespace(value=0.1),
        guard=None,
        sampler=SimpleNamespace(carried_prompts=list),
    )
    return made


def files_of(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resumed", [True, False])
async def test_a_validation_alone_changes_no_file_of_the_training(trainer, tmp_path, resumed):
    options = trainer.config.trainer
    options.default_local_dir, options.logger, options.val_only = str(tmp_path), ["file"], False
    trainer.step, trainer.resumed = 0, False
    with trainer.tracking() as tracking:
        for step in range(1, 10):
            tracking.log({"reward": step}, step)
            tracking.log_generations([{"input": "a", "output": "b", "score": 1}], step)
    before = files_of(tmp_path)
    trainer.step, trainer.resumed, options.val_only = 4, resumed, True
    with trainer.tracking() as tracking:
        tracking.log({"val-core/a": 1.0}, 4)
        tracking.log_generations([{"input": "a", "output": "b", "score": 1}], 4)
    folder = tmp_path / "val_only" / "global_step_4"
    assert read_steps(folder / "metrics.jsonl") == [{"step": 4, "data": {"val-core/a": 1.0}}]
    assert "val_only: true" in (folder / "config.yaml").read_text()
    after = files_of(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.parts[0] == "val_only" for name in after.keys() - before.keys())


class Log:
    def log(self, data, step, backend=None):
        self.step, self.data = step, getattr(self, "data", {}) | data

    def update(self, step, data):
        assert step == self.step


@pytest.mark.parametrize(("save_freq", "saved"), [(100, True), (0, False)])
async def test_a_guard_ends_the_run_after_the_log_and_a_checkpoint(trainer, save_freq, saved):
    trainer.config.trainer.save_freq = save_freq
    trainer.runtime.guard = QuantizationGuard(QuantizationGuardConfig(max_k3_kl=0.01, steps=2))
    log = Log()
    batch = object()

    async def output_errors(measured):
        assert measured is batch
        return {"model.layers.0.mlp.down_proj.weight": [4.0, 1.0]}

    trainer.runtime.output_errors = output_errors
    await trainer.finish_step(batch, {"rollout_corr/k3_kl": 0.02}, log, log)
    assert log.data["rollout_corr/guard_steps_above"] == 1 and trainer.store.latest() is None
    trainer.step = 5
    with pytest.raises(QuantizationGuardError, match=r"0\.03 in step 5\.\n.*outputs.*\n  2 .*down_proj"):
        await trainer.finish_step(batch, {"rollout_corr/k3_kl": 0.03}, log, log)
    assert log.step == 5 and log.data["rollout_corr/guard_steps_above"] == 2
    found = trainer.store.latest()
    assert (None if found is None else found.name) == ("global_step_5" if saved else None)


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
