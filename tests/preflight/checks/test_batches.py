import pytest

from verl.preflight.checks.batches import near

ACTOR = "actor_rollout_ref__actor__"
ROLLOUT = "actor_rollout_ref__rollout__"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # 3 does not divide 8 prompts; 2 and 4 do
        ({ACTOR + "ppo_mini_batch_size": 3}, ("ppo_mini_batch_size=3", "data.train_batch_size=8", "use 2 or 4")),
        ({ACTOR + "ppo_mini_batch_size": 16}, ("larger than data.train_batch_size=8", "use 8")),
        # 2 prompts x 4 samples among 3 ranks: no divisor of 8 times 4 is a multiple of 3; 9 prompts are
        ({"trainer__n_gpus_per_node": 3}, ("16 samples do not divide among 3 ranks", "data.train_batch_size=6 or 9")),
        # 4 x 1 samples among 8 ranks: 8 x 1 would
        ({"trainer__n_gpus_per_node": 8, ROLLOUT + "n": 1}, ("4 samples do not divide among 8 ranks", "use 8")),
        # a rank has 4 x 4 = 16 samples of a mini-batch
        ({ACTOR + "ppo_micro_batch_size_per_gpu": 3}, ("ppo_micro_batch_size_per_gpu=3", "16 samples", "use 2 or 4")),
        ({ACTOR + "ppo_micro_batch_size_per_gpu": 32}, ("does not divide the 16 samples", "use 16")),
        (
            {ACTOR + "ppo_micro_batch_size_per_gpu": None},
            ("ppo_micro_batch_size_per_gpu is not set", "use_dynamic_bsz=True"),
        ),
        (
            {ACTOR + "use_dynamic_bsz": True, ACTOR + "ppo_max_token_len_per_gpu": 31},
            ("ppo_max_token_len_per_gpu=31", "32 tokens", "at least 32"),
        ),
        (
            {ROLLOUT + "log_prob_use_dynamic_bsz": True, ROLLOUT + "log_prob_max_token_len_per_gpu": 8},
            ("rollout.log_prob_max_token_len_per_gpu=8", "at least 32"),
        ),
        ({ROLLOUT + "tensor_model_parallel_size": 2}, ("does not divide trainer.n_gpus_per_node=1", "use 1")),
        (
            {ROLLOUT + "nnodes": 1, ROLLOUT + "n_gpus_per_node": 3, ROLLOUT + "tensor_model_parallel_size": 2},
            ("does not divide actor_rollout_ref.rollout.n_gpus_per_node=3", "use 1 or 3"),
        ),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_nearest_that_do(problem_of, changes, words):
    text = problem_of(**changes)
    assert all(word in text for word in words), text


def test_the_reference_model_s_limits_count_only_where_there_is_one(plan_of, problem_of):
    changes = {
        "actor_rollout_ref__ref__log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref__ref__log_prob_max_token_len_per_gpu": 8,
    }
    plan_of(**changes)
    assert "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8" in problem_of(
        **changes, actor_rollout_ref__actor__use_kl_loss=True
    )


def test_one_sample_a_prompt_with_grpo_is_a_warning(plan_of):
    (warning,) = plan_of(actor_rollout_ref__rollout__n=1).warnings
    assert "rollout.n=1" in warning and "grpo" in warning
    assert plan_of().warnings == []


@pytest.mark.parametrize("size", range(1, 40))
def test_near_against_trying_every_number(size):
    fitting = [number for number in range(1, 31) if 30 % number == 0]
    expected = [
        max((n for n in fitting if n < size), default=None),
        min((n for n in fitting if n > size), default=None),
    ]
    assert near(size, 30, lambda number: 30 % number == 0) == " or ".join(str(n) for n in expected if n is not None)
