import pytest

F = "algorithm__filter_groups__"
ON = {F + "enable": True, F + "metric": "acc"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({F + "enable": True}, ("filter_groups.metric is not set", "seq_reward")),
        ({**ON, "actor_rollout_ref__rollout__n": 1}, ("rollout.n=1", "n=4")),
        (
            {**ON, F + "metric": "seq_final_reward", "algorithm__use_kl_in_reward": True},
            ("metric=seq_final_reward", "use seq_reward"),
        ),
        (
            {**ON, F + "max_num_gen_batches": 3, "data__gen_batch_size": 2},
            ("max_num_gen_batches=3: x 2 prompts", "train_batch_size=8"),
        ),
        ({"algorithm__adv_estimator": "gdpo"}, ("gdpo_reward_keys is not set", "beside its score")),
        (
            {
                "algorithm__adv_estimator": "gdpo",
                "algorithm__gdpo_reward_keys": "[acc,form]",
                "algorithm__gdpo_reward_weights": "[1.0]",
            },
            ("gdpo_reward_weights=[1.0]: 1 weights for 2", "[acc,form]"),
        ),
        ({"data__gen_batch_size": 16}, ("data.gen_batch_size=16", "filter_groups.enable=True")),
        ({**ON, "data__gen_batch_size": 41}, ("data.gen_batch_size=41", "only 40 prompts", "at most 40")),
    ],
)
def test_what_cannot_work(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


def test_what_works(plan_of):
    plan = plan_of(**ON, **{F + "max_num_gen_batches": 4, "data__gen_batch_size": 2})
    assert plan.steps_per_epoch == 5
    plan_of(algorithm__use_kl_in_reward=True, algorithm__kl_ctrl__type="adaptive", algorithm__kl_ctrl__horizon=100)
    plan_of(algorithm__adv_estimator="gdpo", algorithm__gdpo_reward_keys="[acc,form]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"algorithm__use_kl_in_reward": True, "actor_rollout_ref__actor__use_kl_loss": True},
            ("use_kl_in_reward", "twice"),
        ),
        ({"trainer__critic_warmup": 3, "trainer__total_training_steps": 3}, ("critic_warmup=3", "never trained")),
    ],
)
def test_what_is_probably_not_meant(plan_of, changes, words):
    assert any(all(word in warning for word in words) for warning in plan_of(**changes).warnings)
