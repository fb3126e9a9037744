"""A critic in the config: when there is one, what it inherits, what is refused, what the plan says of it."""

import json
import shutil

import pytest

from verl.config import PPOConfig
from verl.config.legacy import migrate
from verl.config.roles import needs_critic, resolve_critic
from verl.preflight.estimate import critic_activation_bytes, critic_state_bytes
from verl.utils.model_dir.model_files import read_model

GAE = {"algorithm__adv_estimator": "gae"}


@pytest.fixture
def critic_model(run_files):
    """A copy of the policy's model, at a path of its own."""
    return shutil.copytree(run_files.model, run_files.root / "critic")


def test_gae_without_a_path(run_files, problem_of):
    problem = problem_of(**GAE)
    assert problem.startswith("critic.model.path is not set: algorithm.adv_estimator=gae needs a critic")
    assert f"use critic.model.path={run_files.model}" in problem and "algorithm.adv_estimator=grpo" in problem


def test_an_enabled_critic_without_a_path(problem_of):
    problem = problem_of(critic__enable="True")
    assert "critic.model.path is not set: critic.enable=True" in problem and "set critic.enable=null" in problem


def test_gae_with_the_critic_switched_off(problem_of, critic_model):
    problem = problem_of(**GAE, critic__enable="False", critic__model__path=critic_model)
    assert problem.startswith("critic.enable=False: algorithm.adv_estimator=gae needs a critic; use critic.enable=null")


@pytest.mark.parametrize(
    ("estimator", "enable", "needed"),
    [("gae", None, True), ("grpo", None, False), ("grpo", True, True), ("gae", False, False), ("rloo", None, False)],
)
def test_when_there_is_a_critic(estimator, enable, needed):
    config = PPOConfig()
    config.algorithm.adv_estimator, config.critic.enable = estimator, enable
    assert needs_critic(config) is needed


def test_what_is_left_open_is_the_actors():
    config = PPOConfig()
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    actor.ppo_mini_batch_size, actor.ppo_micro_batch_size_per_gpu, actor.use_dynamic_bsz = 32, 3, True
    actor.ppo_epochs, actor.loss_agg_mode, actor.strategy = 2, "token-sum", "fsdp2"
    model.path, model.trust_remote_code = "/policy", True
    critic = resolve_critic(config)
    assert (critic.ppo_mini_batch_size, critic.ppo_micro_batch_size_per_gpu, critic.use_dynamic_bsz) == (32, 3, True)
    assert (critic.ppo_epochs, critic.loss_agg_mode, critic.strategy) == (2, "token-sum", "fsdp2")
    assert (critic.forward_micro_batch_size_per_gpu, critic.forward_max_token_len_per_gpu) == (3, 32768)
    assert (critic.model.path, critic.model.tokenizer_path, critic.model.trust_remote_code) == (None, "/policy", True)
    assert (critic.optim.lr, critic.optim.clip_grad, critic.cliprange_value) == (1e-5, 1.0, 0.5)
    assert config.critic.ppo_epochs is None and config.critic.model.tokenizer_path is None, "the config was changed"


def test_its_own_values_win():
    config = PPOConfig()
    config.critic.ppo_mini_batch_size, config.critic.use_dynamic_bsz, config.critic.ppo_epochs = 64, False, 4
    config.critic.ppo_micro_batch_size_per_gpu, config.critic.ppo_max_token_len_per_gpu = 8, 100
    config.critic.model.trust_remote_code = False
    config.actor_rollout_ref.actor.use_dynamic_bsz = config.actor_rollout_ref.model.trust_remote_code = True
    critic = resolve_critic(config)
    assert (critic.ppo_mini_batch_size, critic.use_dynamic_bsz, critic.ppo_epochs) == (64, False, 4)
    assert (critic.forward_micro_batch_size_per_gpu, critic.forward_max_token_len_per_gpu) == (8, 100)
    assert critic.model.trust_remote_code is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo_mini_batch_size": 3}, ("critic.ppo_mini_batch_size=3: does not divide", "use 2 or 4")),
        ({"ppo_mini_batch_size": 16}, ("critic.ppo_mini_batch_size=16: is larger", "use 8")),
        ({"ppo_micro_batch_size_per_gpu": 3}, ("critic.ppo_micro_batch_size_per_gpu=3: does not", "use 2 or 4")),
        (
            {"use_dynamic_bsz": "True", "ppo_max_token_len_per_gpu": 31, "forward_max_token_len_per_gpu": 32},
            ("critic.ppo_max_token_len_per_gpu=31: a sample may have 32 tokens", "at least 32"),
        ),
        (
            {"use_dynamic_bsz": "True", "forward_max_token_len_per_gpu": 31},
            ("critic.forward_max_token_len_per_gpu=31: a sample may have 32 tokens", "at least 32"),
        ),
    ],
)
def test_batches_that_do_not_fit(problem_of, critic_model, changes, words):
    problem = problem_of(
        **GAE, critic__model__path=critic_model, **{f"critic__{name}": value for name, value in changes.items()}
    )
    assert all(word in problem for word in words), problem


def test_what_the_actors_batches_do_wrong_is_said_once(problem_of, critic_model):
    problem = problem_of(
        **GAE, critic__model__path=critic_model, actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu="null"
    )
    assert problem.startswith("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is not set")
    problem = problem_of(**GAE, critic__model__path=critic_model, actor_rollout_ref__actor__ppo_mini_batch_size=3)
    assert problem.startswith("actor_rollout_ref.actor.ppo_mini_batch_size=3")


def test_an_inherited_size_that_only_the_critic_needs(problem_of, critic_model):
    problem = problem_of(
        **GAE,
        critic__model__path=critic_model,
        critic__use_dynamic_bsz="False",
        actor_rollout_ref__actor__use_dynamic_bsz="True",
        actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu="null",
    )
    assert problem.startswith("critic.ppo_micro_batch_size_per_gpu is not set")
    assert "critic.use_dynamic_bsz=True" in problem


def change_config(directory, **fields):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_its_model(run_files, problem_of, critic_model):
    problem = problem_of(**GAE, critic__model__path=run_files.root / "nowhere")
    assert problem.startswith("critic.model.path=") and "does not exist" in problem
    change_config(critic_model, vocab_size=31)
    problem = problem_of(**GAE, critic__model__path=critic_model)
    assert "knows 31 tokens and the policy 32" in problem
    change_config(critic_model, vocab_size=32, max_position_embeddings=20)
    problem = problem_of(**GAE, critic__model__path=critic_model)
    assert "has 20 positions, and a sample may have 32 tokens" in problem


def test_a_vocabulary_that_the_weights_do_not_have(problem_of, plan_of, critic_model):
    problem = problem_of(**GAE, critic__model__path=critic_model, critic__model__override_config="{vocab_size: 31}")
    assert problem.startswith("critic.model.override_config.vocab_size=31: ") and "has 32 rows" in problem
    problem = problem_of(actor_rollout_ref__model__override_config="{vocab_size: 64}")
    assert problem.startswith("actor_rollout_ref.model.override_config.vocab_size=64: ")
    plan_of(actor_rollout_ref__model__override_config="{vocab_size: 32}")


def test_its_tokenizer(problem_of, plan_of, critic_model, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        problem = problem_of(**GAE, critic__model__path=critic_model, critic__model__tokenizer_path=folder)
        assert problem.startswith(f"critic.model.tokenizer_path={folder}: no tokenizer there")
    plan_of(**GAE, critic__model__path=critic_model, critic__model__tokenizer_path=critic_model)


def test_a_checkpoint_of_nothing(problem_of, problems_of, plan_of, critic_model):
    actor = {"actor_rollout_ref__actor__checkpoint__save_contents": "[]"}
    both = actor | GAE | {"critic__model__path": critic_model, "critic__checkpoint__save_contents": "[]"}
    problem = problem_of(**actor, trainer__save_freq=5)
    assert problem.startswith("actor_rollout_ref.actor.checkpoint.save_contents=[]: ") and "save_freq=5" in problem
    starts = [problem.split("=")[0] for problem in problems_of(**both, trainer__save_freq=5)]
    assert starts == [f"{role}.checkpoint.save_contents" for role in ("actor_rollout_ref.actor", "critic")]
    plan_of(**both)


def test_features_that_are_not_there_in_a_critic_that_is_not_there(plan_of, problem_of, problems_of, critic_model):
    changes = {"critic__fsdp__param_offload": True, "critic__shuffle": True, "critic__strategy": "megatron"}
    plan = plan_of(**changes)
    assert (
        "no effect without a critic (algorithm.adv_estimator=grpo): "
        "critic.fsdp.param_offload, critic.shuffle, critic.strategy"
    ) in plan.notes
    assert "critic.strategy=megatrn: megatrn is unknown" in problem_of(critic__strategy="megatrn")
    assert len(problems_of(**GAE, critic__model__path=critic_model, **changes)) == 3


def test_the_plan_and_the_notes(plan_of, critic_model):
    plan = plan_of(**GAE, critic__model__path=critic_model, critic__ppo_mini_batch_size=2, critic__ppo_epochs=3)
    assert plan.critic.optimizer_steps_per_step == 12
    assert (plan.critic.samples_per_mini_batch, plan.critic.samples_per_rank) == (8, 8)
    assert plan.critic.parameters == plan.parameters
    assert "12 optimizer steps a step, of 8 samples, 8 on each rank" in plan.render()
    assert [note for note in plan.notes if "rollout.n=4" in note and "trajectory of its own" in note]
    assert not [note for note in plan.notes if "critic." in note]
    assert plan_of().critic is None and "critic" not in plan_of().render()


def test_a_critic_that_no_advantage_is_made_of(plan_of, critic_model):
    plan = plan_of(critic__enable="True", critic__model__path=critic_model)
    assert plan.critic is not None
    assert [note for note in plan.notes if "critic.enable=True" in note and "grpo" in note]


def test_keys_without_an_effect(plan_of, critic_model):
    notes = plan_of(critic__model__path=critic_model, critic__optim__lr=1e-4).notes
    assert "no effect without a critic (algorithm.adv_estimator=grpo): critic.model.path, critic.optim.lr" in notes
    notes = plan_of(
        **GAE,
        critic__model__path=critic_model,
        critic__forward_max_token_len_per_gpu=64,
        critic__optim__min_lr_ratio=0.1,
        critic__checkpoint__save_contents="[model]",
    ).notes
    assert "no effect without dynamic micro-batches: critic.forward_max_token_len_per_gpu" in notes
    assert "no effect on a constant schedule: critic.optim.min_lr_ratio" in notes
    assert "no effect without checkpoints (trainer.save_freq): critic.checkpoint.save_contents" in notes


def test_memory(plan_of, critic_model):
    config = PPOConfig()
    config.data.max_prompt_length = config.data.max_response_length = 16
    config.actor_rollout_ref.actor.ppo_mini_batch_size, config.actor_rollout_ref.rollout.n = 8, 4
    config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu = 2
    config.critic.fsdp.model_dtype, config.critic.fsdp.dtype = "bf16", "float32"
    config.critic.model.enable_gradient_checkpointing = False
    assert critic_state_bytes(config, 1000, 2) == 1000 * 4 * 2 // 2
    # hidden 16, inner 32, 2 layers; 2 samples of 32 tokens in float32
    assert critic_activation_bytes(config, read_model(critic_model), "cpu", 1) == 64 * (8 * 16 + 4 * 32) * 4 * 2
    without, with_critic = plan_of().memory, plan_of(**GAE, critic__model__path=critic_model).memory
    assert with_critic.trainer_bytes >= without.trainer_bytes + 16 * plan_of().parameters


def test_spellings_of_earlier_versions():
    old = {
        "critic": {
            "grad_clip": 0.5,
            "model": {"path": "/m", "fsdp_config": {"param_offload": False}},
            "optim": {"warmup_style": "cosine"},
        }
    }
    assert migrate(old) == {
        "critic": {
            "model": {"path": "/m"},
            "optim": {"lr_scheduler_type": "cosine", "clip_grad": 0.5},
            "fsdp": {"param_offload": False},
        }
    }
