import json
import shutil

import pytest

GAE = {"algorithm__adv_estimator": "gae"}


@pytest.fixture
def critic_model(run_files):
    """Return the path of a copy of the policy's model."""
    return shutil.copytree(run_files.model, run_files.root / "critic")


def test_gae_without_a_model_is_an_error(run_files, problem_of):
    problem = problem_of(**GAE)
    assert problem.startswith("critic.model.path is not set: algorithm.adv_estimator=gae needs a critic")
    assert f"use critic.model.path={run_files.model}" in problem and "algorithm.adv_estimator=grpo" in problem


def test_an_enabled_critic_without_a_model_is_an_error(problem_of):
    problem = problem_of(critic__enable="True")
    assert "critic.model.path is not set: critic.enable=True" in problem and "set critic.enable=null" in problem


def test_gae_without_a_critic_is_an_error(problem_of, critic_model):
    problem = problem_of(**GAE, critic__enable="False", critic__model__path=critic_model)
    assert problem.startswith("critic.enable=False: algorithm.adv_estimator=gae needs a critic; use critic.enable=null")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ppo_mini_batch_size": 3}, ("critic.ppo_mini_batch_size=3: must divide", "use 2 or 4")),
        ({"ppo_mini_batch_size": 16}, ("critic.ppo_mini_batch_size=16: must be at most", "use 8")),
        ({"ppo_micro_batch_size_per_gpu": 3}, ("critic.ppo_micro_batch_size_per_gpu=3: must divide", "use 2 or 4")),
        (
            {"use_dynamic_bsz": "True", "ppo_max_token_len_per_gpu": 31, "forward_max_token_len_per_gpu": 32},
            ("critic.ppo_max_token_len_per_gpu=31: a sample can have 32 tokens", "at least 32"),
        ),
        (
            {"use_dynamic_bsz": "True", "forward_max_token_len_per_gpu": 31},
            ("critic.forward_max_token_len_per_gpu=31: a sample can have 32 tokens", "at least 32"),
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_are_errors(problem_of, critic_model, changes, words):
    problem = problem_of(
        **GAE, critic__model__path=critic_model, **{f"critic__{name}": value for name, value in changes.items()}
    )
    assert all(word in problem for word in words), problem


def test_inherited_batch_sizes_are_reported_once(problem_of, critic_model):
    problem = problem_of(
        **GAE, critic__model__path=critic_model, actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu="null"
    )
    assert problem.startswith("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu is not set")
    problem = problem_of(**GAE, critic__model__path=critic_model, actor_rollout_ref__actor__ppo_mini_batch_size=3)
    assert problem.startswith("actor_rollout_ref.actor.ppo_mini_batch_size=3")


def test_an_inherited_size_that_only_the_critic_needs_is_an_error_of_the_critic(problem_of, critic_model):
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


def test_invalid_models_are_errors(run_files, problem_of, critic_model):
    problem = problem_of(**GAE, critic__model__path=run_files.root / "nowhere")
    assert problem.startswith("critic.model.path=") and "does not exist" in problem
    change_config(critic_model, vocab_size=31)
    problem = problem_of(**GAE, critic__model__path=critic_model)
    assert "has 31 tokens in its vocabulary, but the policy has 32" in problem
    change_config(critic_model, vocab_size=32, max_position_embeddings=20)
    problem = problem_of(**GAE, critic__model__path=critic_model)
    assert "has 20 positions, but a sample can have 32 tokens" in problem


def test_a_vocabulary_size_other_than_the_checkpoints_is_an_error(problem_of, plan_of, critic_model):
    problem = problem_of(**GAE, critic__model__path=critic_model, critic__model__override_config="{vocab_size: 31}")
    assert problem.startswith("critic.model.override_config.vocab_size=31: ") and "have 32 rows" in problem
    problem = problem_of(actor_rollout_ref__model__override_config="{vocab_size: 64}")
    assert problem.startswith("actor_rollout_ref.model.override_config.vocab_size=64: ")
    plan_of(actor_rollout_ref__model__override_config="{vocab_size: 32}")


def test_a_missing_tokenizer_is_an_error(problem_of, plan_of, critic_model, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        problem = problem_of(**GAE, critic__model__path=critic_model, critic__model__tokenizer_path=folder)
        assert problem.startswith(f"critic.model.tokenizer_path={folder}: no tokenizer found")
    plan_of(**GAE, critic__model__path=critic_model, critic__model__tokenizer_path=critic_model)


def test_unsupported_values_are_errors_only_with_a_critic(plan_of, problem_of, problems_of, critic_model):
    changes = {"critic__data_loader_seed": 7, "critic__shuffle": True, "critic__strategy": "megatron"}
    plan = plan_of(**changes)
    assert (
        "no effect without a critic (algorithm.adv_estimator=grpo): "
        "critic.data_loader_seed, critic.shuffle, critic.strategy"
    ) in plan.notes
    assert "critic.strategy=megatrn: megatrn is unknown" in problem_of(critic__strategy="megatrn")
    assert len(problems_of(**GAE, critic__model__path=critic_model, **changes)) == 3


def test_plan_and_notes_of_a_run_with_a_critic(plan_of, critic_model):
    plan = plan_of(**GAE, critic__model__path=critic_model, critic__ppo_mini_batch_size=2, critic__ppo_epochs=3)
    assert plan.critic.optimizer_steps_per_step == 12
    assert (plan.critic.samples_per_mini_batch, plan.critic.samples_per_rank) == (8, 8)
    assert plan.critic.parameters == plan.parameters
    assert "12 optimizer steps per step, mini-batch of 8 samples, 8 on each rank" in plan.render()
    assert [note for note in plan.notes if "rollout.n=4" in note and "separate trajectory" in note]
    assert not [note for note in plan.notes if "critic." in note]
    assert plan_of().critic is None and "critic" not in plan_of().render()


def test_a_critic_that_the_estimator_does_not_use_is_a_note(plan_of, critic_model):
    plan = plan_of(critic__enable="True", critic__model__path=critic_model)
    assert plan.critic is not None
    assert [note for note in plan.notes if "critic.enable=True" in note and "grpo" in note]


def test_unused_keys_are_notes(plan_of, critic_model):
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
    assert "no effect with critic.optim.lr_scheduler_type=constant: critic.optim.min_lr_ratio" in notes
    assert "no effect without checkpoints (trainer.save_freq): critic.checkpoint.save_contents" in notes
