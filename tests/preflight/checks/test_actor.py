import pytest

ACTOR = "actor_rollout_ref__actor__"
LOSS = ACTOR + "policy_loss__"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        # 3 does not divide 8 prompts; 2 and 4 do
        ({ACTOR + "ppo_mini_batch_size": 3}, ("ppo_mini_batch_size=3", "data.train_batch_size=8", "use 2 or 4")),
        ({ACTOR + "ppo_mini_batch_size": 16}, ("at most data.train_batch_size=8", "use 8")),
        # 2 prompts x 4 samples among 3 ranks: no divisor of 8 times 4 is a multiple of 3; 9 prompts are
        ({"trainer__n_gpus_per_node": 3}, ("16 samples", "among 3 ranks", "data.train_batch_size=6 or 9")),
        # 4 x 1 samples among 8 ranks: 8 x 1 would fit
        (
            {"trainer__n_gpus_per_node": 8, "actor_rollout_ref__rollout__n": 1},
            ("4 samples", "among 8 ranks", "use 8"),
        ),
        # a rank has 4 x 4 = 16 samples of a mini-batch
        ({ACTOR + "ppo_micro_batch_size_per_gpu": 3}, ("ppo_micro_batch_size_per_gpu=3", "16 samples", "use 2 or 4")),
        (
            {ACTOR + "ppo_micro_batch_size_per_gpu": None},
            ("ppo_micro_batch_size_per_gpu is not set", "use_dynamic_bsz=True"),
        ),
        (
            {ACTOR + "use_dynamic_bsz": True, ACTOR + "ppo_max_token_len_per_gpu": 31},
            ("ppo_max_token_len_per_gpu=31", "32 tokens", "at least 32"),
        ),
    ],
)
def test_batch_sizes_that_do_not_fit_are_errors_with_the_nearest_sizes(problem_of, changes, words):
    text = problem_of(**changes)
    assert all(word in text for word in words), text


def test_a_micro_batch_may_be_larger_than_the_share_of_a_rank(plan_of):
    assert plan_of(**{ACTOR + "ppo_micro_batch_size_per_gpu": 32}).micro_batches_per_rank == 1


def test_limits_of_the_reference_model_are_checked_only_with_a_reference_model(plan_of, problem_of):
    changes = {
        "actor_rollout_ref__ref__log_prob_use_dynamic_bsz": True,
        "actor_rollout_ref__ref__log_prob_max_token_len_per_gpu": 8,
    }
    plan_of(**changes)
    assert "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=8" in problem_of(
        **changes, actor_rollout_ref__actor__use_kl_loss=True
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({LOSS + "loss_mode": "dro"}, ("policy_loss.dro_beta is not set", "loss_mode=dro", "0.05")),
        (
            {LOSS + "loss_mode": "clip_cov", LOSS + "clip_cov_lb": 5.0},
            ("policy_loss.clip_cov_lb=5.0", "clip_cov_ub=5.0", "smaller"),
        ),
    ],
)
def test_invalid_settings_of_a_policy_loss_are_errors(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "changes",
    [
        {LOSS + "loss_mode": "dro", LOSS + "dro_beta": 0.05},
        {LOSS + "loss_mode": "clip_cov"},
        {LOSS + "loss_mode": "cispo", ACTOR + "clip_ratio_low": 10},
        {LOSS + "loss_mode": "geo_mean", ACTOR + "clip_ratio_low": 0.4, ACTOR + "clip_ratio_high": 0.4},
        {LOSS + "loss_mode": "dppo_tv", ACTOR + "clip_ratio_low": 0.15, ACTOR + "clip_ratio_c": 10000},
    ],
)
def test_valid_settings_of_a_policy_loss_have_no_warning(plan_of, changes):
    plan = plan_of(**changes)
    assert not any("clip" in line or "policy_loss" in line for line in plan.warnings + plan.notes)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("gspo", ("clip_ratio_low=0.2, clip_ratio_high=0.2 with", "loss_mode=gspo", "clip_ratio_high=4e-4")),
        ("dppo_tv", ("loss_mode=dppo_tv", "clip_ratio_low=0.15", "clip_ratio_c of 20")),
        ("dppo_kl", ("loss_mode=dppo_kl", "clip_ratio_low=0.15", "clip_ratio_c of 20")),
    ],
)
def test_bounds_of_ppo_on_another_loss_are_a_warning(plan_of, loss, words):
    (warning,) = [line for line in plan_of(**{LOSS + "loss_mode": loss}).warnings if "clip_ratio" in line]
    assert all(word in warning for word in words), warning
    for changes in ({ACTOR + "clip_ratio_low": 3e-4}, {ACTOR + "clip_ratio_high": "null", ACTOR + "clip_ratio": 0.1}):
        plan = plan_of(**{LOSS + "loss_mode": loss}, **changes)
        assert not [line for line in plan.warnings if "clip_ratio" in line]


def test_a_lower_bound_that_never_clips_is_a_warning(plan_of):
    found = [line for line in plan_of(**{ACTOR + "clip_ratio_low": 10}).warnings if "clip_ratio_low=10" in line]
    assert len(found) == 1
