from pathlib import Path

import pytest

from verl.config import PPOConfig
from verl.preflight.train_state import actor_state, critic_state, ref_state
from verl.utils.model_dir.model_files import ModelFiles

MODEL = ModelFiles(Path("model"), {}, {}, 1200, None, None, {"layer.q_proj.weight": (20, 10)})


def make_config(ranks=4):
    config = PPOConfig()
    config.trainer.n_gpus_per_node, config.trainer.nnodes = ranks, 1
    return config


@pytest.mark.parametrize(("size", "shards"), [(-1, 4), (8, 4), (4, 4), (2, 2), (1, 1)])
def test_state_is_divided_by_the_ranks_of_a_copy(size, shards):
    config = make_config()
    config.actor_rollout_ref.actor.use_kl_loss = True
    config.algorithm.adv_estimator = "gae"
    for section in (
        config.actor_rollout_ref.actor.fsdp_config,
        config.actor_rollout_ref.ref.fsdp_config,
        config.critic.fsdp,
    ):
        section.fsdp_size = size
    actor, ref, critic = actor_state(config, MODEL), ref_state(config, MODEL), critic_state(config, MODEL)
    held = 1200 * 4 // shards
    assert (actor.weights, actor.gradients, actor.moments, actor.total) == (held, held, 2 * held, 4 * held)
    assert critic == actor
    assert (ref.weights, ref.total) == (held, held)


def test_models_that_the_run_does_not_have_have_no_state():
    config = make_config()
    config.algorithm.adv_estimator = "grpo"
    assert ref_state(config, MODEL).total == critic_state(config, MODEL).total == 0


def test_bfloat16_master_weights_and_adapters():
    config = make_config(2)
    config.actor_rollout_ref.actor.fsdp_config.model_dtype = "bf16"
    assert actor_state(config, MODEL).total == 1200 * 2 * 4 // 2
    config.actor_rollout_ref.model.lora_rank = 4
    # A [4, 10] and B [20, 4] in float32
    adapters = 4 * (10 + 20) * 4
    state = actor_state(config, MODEL)
    assert (state.weights, state.gradients, state.moments) == (
        (1200 * 2 + adapters) // 2,
        adapters // 2,
        2 * adapters // 2,
    )
