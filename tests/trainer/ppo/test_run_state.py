"""The state of a run in a checkpoint: what is stored, and loading of older states."""

from types import SimpleNamespace

import pytest

from verl.config import PPOConfig
from verl.config.quantization_guard import QuantizationGuardConfig
from verl.preflight.inputs import RunInputs, read_inputs
from verl.trainer.ppo.checkpoint import CheckpointError, load_driver_state, save_driver_state
from verl.trainer.ppo.quantization_guard import QuantizationGuard
from verl.trainer.ppo.run_state import HFExportError, export_run, load_run, save_run
from verl.trainer.rollouts.prompts import LoaderState, PromptId

LOADER = {"version": 1, "epoch": 2, "samples": 6, "rows": 9, "shuffle": True, "seed": 5}


class Ranks:
    """Trainer ranks that record their calls."""

    def __init__(self):
        self.calls = []

    async def all(self, method, *arguments):
        self.calls.append((method.__name__, *arguments))


class Run:
    """The parts of a `Runtime` that a checkpoint stores."""

    def __init__(self, *, kl_type="fixed", with_critic=False):
        self.config = PPOConfig()
        self.config.algorithm.kl_ctrl.type = kl_type
        self.with_critic = with_critic
        self.inputs = RunInputs({"data.train_files": {}}, {"device": "cpu"}, "code")
        self.kl_controller = SimpleNamespace(value=0.1)
        self.guard = None
        self.ranks, self.visible, self.resumed = Ranks(), [], None
        self.processes = SimpleNamespace(trainers=self.ranks, check_visible=self.check_visible)
        self.data = SimpleNamespace(prompts=SimpleNamespace(state=LoaderState(7, LOADER), restore=self.restore))
        self.sampler = SimpleNamespace(
            carried_prompts=lambda: [PromptId(8, 2, 3), PromptId(9, 2, 4)], resume_prompts=self.resume_prompts
        )

    async def check_visible(self, paths):
        self.visible.append(paths)

    def restore(self, state):
        self.data.prompts.state = state

    def resume_prompts(self, prompts):
        self.resumed = prompts


async def test_a_saved_state_is_restored(tmp_path):
    run = Run(kl_type="adaptive")
    run.kl_controller.value = 0.25
    await save_run(run, tmp_path, 3)
    assert run.ranks.calls == [("save_checkpoint", str(tmp_path)), ("checksum_files", str(tmp_path))]
    stored = load_driver_state(tmp_path)
    assert stored == {
        "step": 3,
        "train_loader": LOADER,
        "draws": 7,
        "kl_coef": 0.25,
        "carried": [(8, 2, 3), (9, 2, 4)],
    }

    inputs = read_inputs(tmp_path)
    assert inputs.files == run.inputs.files and inputs.versions == run.inputs.versions
    assert inputs.data_order == {"rows": 9, "shuffle": True, "seed": 5}

    other = Run(kl_type="adaptive")
    other.data.prompts.state = None
    assert await load_run(other, tmp_path) == 3
    assert other.ranks.calls == [("load_checkpoint", str(tmp_path))]
    assert other.visible == [{"checkpoint": tmp_path}]
    assert other.data.prompts.state == LoaderState(7, LOADER)
    assert other.resumed == [PromptId(8, 2, 3), PromptId(9, 2, 4)]
    assert other.kl_controller.value == 0.25


async def test_the_state_of_a_guard_is_restored(tmp_path):
    run, other = Run(), Run()
    for each in (run, other):
        each.guard = QuantizationGuard(QuantizationGuardConfig(max_k3_kl=0.01, steps=1, action="correct"))
    assert run.guard.observe({"rollout_corr/k3_kl": 0.02})
    run.guard.act(3, {"rollout_corr/k3_kl": 0.02}, {})
    await save_run(run, tmp_path, 3)
    assert load_driver_state(tmp_path)["guard"] == {"steps_above": 1, "correcting": True}
    await load_run(other, tmp_path)
    assert other.guard.state == run.guard.state


async def test_the_order_of_a_sampler_is_recorded(tmp_path):
    run = Run()
    loader = {"version": 1, "drawn": 4, "sampler": "Mine", "rows": 9, "untrained": [3], "sampler_state": {"a": 1}}
    run.data.prompts.state = LoaderState(2, loader)
    await save_run(run, tmp_path, 3)
    assert load_driver_state(tmp_path)["train_loader"] == loader
    assert read_inputs(tmp_path).data_order == {"rows": 9, "sampler": "Mine"}


async def test_a_failed_export_leaves_the_resumable_part(tmp_path):
    """A rank fails while it writes the critic's Hugging Face directory."""

    class FailingRanks(Ranks):
        async def all(self, method, *arguments):
            if method.__name__ != "export_hf":
                return await super().all(method, *arguments)
            for model in ("actor", "critic"):
                (tmp_path / model / "huggingface").mkdir(parents=True)
                (tmp_path / model / "huggingface" / "model.safetensors").write_text("half")
            raise ValueError("generation config is invalid")

    run = Run()
    run.processes.trainers = FailingRanks()
    await save_run(run, tmp_path, 3)
    with pytest.raises(HFExportError, match="ValueError: generation config is invalid"):
        await export_run(run, tmp_path)
    written = ["actor", "config.yaml", "config_changes.yaml", "critic", "data.pt", "inputs.json"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == written
    assert await load_run(Run(), tmp_path) == 3


async def test_a_state_without_the_later_keys_is_restored(tmp_path):
    save_driver_state(tmp_path, {"step": 4, "train_loader": LOADER})
    run = Run(kl_type="adaptive")
    assert await load_run(run, tmp_path) == 4
    assert run.data.prompts.state == LoaderState(4, LOADER) and run.resumed == []
    assert run.kl_controller.value == 0.1


@pytest.mark.parametrize("state", [[1, 2], {"step": 4}, {"_snapshot": {}}])
async def test_a_state_of_another_program_is_refused(tmp_path, state):
    save_driver_state(tmp_path, state)
    run = Run()
    with pytest.raises(CheckpointError, match=r"data\.pt does not hold the position .* choose another checkpoint"):
        await load_run(run, tmp_path)
    assert run.ranks.calls == []


async def test_a_fixed_kl_weight_comes_from_the_config(tmp_path):
    save_driver_state(tmp_path, {"step": 4, "train_loader": LOADER, "kl_coef": 0.5})
    run = Run()
    await load_run(run, tmp_path)
    assert run.kl_controller.value == 0.1


async def test_a_checkpoint_without_critic_is_rejected_by_a_run_that_has_one(tmp_path):
    save_driver_state(tmp_path, {"step": 4, "train_loader": LOADER})
    run = Run(with_critic=True)
    with pytest.raises(CheckpointError, match=r"has no critic, but algorithm\.adv_estimator=.* trains one"):
        await load_run(run, tmp_path)
    assert run.ranks.calls == []
    (tmp_path / "critic").mkdir()
    assert await load_run(run, tmp_path) == 4
