"""The modules that start a run, and the config that each of them composes."""

import importlib.util

import pytest
from omegaconf import OmegaConf

from verl.config import ConfigError, load_config
from verl.config.entry_points import ENTRY_POINTS, MAIN_PPO, ONE_STEP_OFF
from verl.config.write_yaml import FOLDER
from verl.trainer.main_ppo import compose

# The command line of upstream verl's one_step_off_policy/shell/grpo_0.6b_gsm8k_fsdp2_2_6.sh, as far as it is special.
SEPARATE = [
    "actor_rollout_ref.hybrid_engine=False",
    "rollout.nnodes=1",
    "rollout.n_gpus_per_node=2",
    "trainer.n_gpus_per_node=6",
]


@pytest.mark.parametrize("entry", ENTRY_POINTS.values(), ids=lambda entry: entry.module)
def test_every_module_exists_and_has_its_file(entry):
    assert importlib.util.find_spec(entry.module) is not None
    values = OmegaConf.load(FOLDER / f"{entry.config_name}.yaml")
    for name, value in entry.values.items():
        assert OmegaConf.select(values, name) == value


def test_one_step_off_runs_one_step_ahead_on_devices_of_the_replicas_own():
    config = compose(SEPARATE, ONE_STEP_OFF).valid()
    rollout = config.actor_rollout_ref.rollout
    assert (config.trainer.rollout_lag, rollout.nnodes, rollout.n_gpus_per_node) == (1, 1, 2)
    assert config.algorithm.rollout_correction.bypass_mode and rollout.checkpoint_engine.backend == "nccl"
    assert compose([*SEPARATE, "algorithm.rollout_correction.bypass_mode=False"], ONE_STEP_OFF).valid() == load_config(
        [*SEPARATE, "trainer.rollout_lag=1", "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl"]
    )


@pytest.mark.slow
def test_other_names_of_main_ppo_compose_the_same_config():
    assert (
        compose(["trainer.seed=3"], ENTRY_POINTS["verl.trainer.main_ppo_sync"]).valid()
        == compose(["trainer.seed=3"]).valid()
    )
    assert compose(["trainer.seed=3"]).valid() == load_config(["trainer.seed=3"])


@pytest.mark.parametrize("options", [[], ["--config-path=config", "--config-name=one_step_off_ppo_trainer.yaml"]])
def test_a_fixed_key_keeps_its_value(options):
    with pytest.raises(
        ConfigError, match=r"^trainer.rollout_lag=0: verl.experimental.one_step_off_policy.main_ppo alw"
    ):
        compose([*options, "trainer.rollout_lag=0"], ONE_STEP_OFF).valid()
    assert compose(options, ONE_STEP_OFF).valid().trainer.rollout_lag == 1


def test_a_file_of_the_user_runs_one_step_ahead(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\nrollout: {nnodes: 3, n_gpus_per_node: 4}\n")
    config = compose([f"--config-path={tmp_path}", "--config-name=mine"], ONE_STEP_OFF).valid()
    assert (config.trainer.rollout_lag, config.actor_rollout_ref.rollout.nnodes) == (1, 3)
    assert compose([f"--config-path={tmp_path}", "--config-name=mine"], MAIN_PPO).valid().trainer.rollout_lag == 0
