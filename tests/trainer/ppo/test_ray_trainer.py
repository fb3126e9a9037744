"""Parts of the training loop that need no processes: saving, and the logs of a validation."""

import errno
from types import SimpleNamespace

import pytest
import torch

from verl.config import PPOConfig
from verl.config.quantization_guard import QuantizationGuardConfig
from verl.preflight.inputs import RunInputs
from verl.protocol import DataProto
from verl.single_controller.actor import ActorDied
from verl.trainer.ppo.checkpoint import CheckpointError, CheckpointStore
from verl.trainer.ppo.quantization_guard import QuantizationGuard, QuantizationGuardError
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.utils.tracking.jsonl import read_steps
from verl.workers.engine.rank_errors import RankFilesError


class Ranks:
    """Trainer ranks whose method `fails` raises an error."""

    def __init__(self, fails, error=None):
        self.fails, self.error = fails, error or ValueError("rank 0 failed")

    async def all(self, method, directory):
        if method.__name__ == self.fails:
            raise self.error


@pytest.fixture
def trainer(tmp_path):
    made = object.__new__(RayPPOTrainer)
    made.config, made.store, made.step, made.continues = PPOConfig(), CheckpointStore(tmp_path), 4, False
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


FULL = RankFilesError(errno.ENOSPC, "rank 1: OSError: [Errno 28] No space left on device")


@pytest.mark.parametrize("method", ["save_checkpoint", "export_hf"])
async def test_a_run_may_continue_after_a_save_that_the_disk_refused(trainer, method, caplog):
    trainer.config.trainer.on_save_error = "continue"
    trainer.runtime.processes.trainers, log = Ranks(method, FULL), Log()
    await trainer.save_or_continue(log)
    assert log.data == {"checkpoint/failed_saves": 1} and log.step == 4
    assert "step_4" in caplog.text or "step 4" in caplog.text
    assert "rank 1" in caplog.text and "on_save_error=continue" in caplog.text

    trainer.runtime.processes.trainers, trainer.step = Ranks(""), 5
    await trainer.save_or_continue(log)
    assert trainer.store.latest().name == "global_step_5"


@pytest.mark.parametrize(
    ("on_save_error", "step", "error"),
    [("stop", 4, FULL), ("continue", 9, FULL), ("continue", 4, ActorDied("the TrainWorker process died"))],
    ids=["stop", "last step", "another error"],
)
async def test_a_failed_save_ends_the_run(trainer, on_save_error, step, error):
    trainer.config.trainer.on_save_error, trainer.step = on_save_error, step
    trainer.runtime.processes.trainers = Ranks("save_checkpoint", error)
    with pytest.raises(CheckpointError, match=f"global_step_{step} was not saved"):
        await trainer.save_or_continue(Log())


async def test_a_step_joins_the_batches_and_metrics_of_its_local_updates(trainer):
    def batch(prompt, tokens):
        columns = {"prompts": [prompt], "responses": [tokens], "attention_mask": [[1] * len(prompt + tokens)]}
        return DataProto.from_dict({name: torch.tensor(values) for name, values in columns.items()})

    updates = [
        (batch([3], [4, 5]), {"actor/loss": 1.0, "actor/perf/max_memory_allocated_gb": 5.0}),
        (batch([6, 7], [8]), {"actor/loss": 3.0, "actor/perf/max_memory_allocated_gb": 4.0, "reward/num_errors": 2.0}),
    ]
    trainer.runtime.local_updates = 2
    trainer.runtime.data.tokenizer = SimpleNamespace(pad_token_id=0)

    async def local_update(rollouts, timing):
        return updates.pop(0)

    trainer.local_update = local_update
    joined, metrics = await trainer.train_step(None, {})
    assert joined.batch["prompts"].tolist() == [[0, 3], [6, 7]]
    assert joined.batch["responses"].tolist() == [[4, 5], [8, 0]]
    assert metrics == {"actor/loss": 2.0, "actor/perf/max_memory_allocated_gb": 5.0, "reward/num_errors": 2.0}
