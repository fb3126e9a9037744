import pytest

F = "algorithm__filter_groups__"
ON = {F + "enable": True, F + "metric": "acc"}
GDPO = {"algorithm__adv_estimator": "gdpo", "algorithm__gdpo_reward_keys": "[acc,form]"}
ADAPTIVE = {"algorithm__use_kl_in_reward": True, "algorithm__kl_ctrl__type": "adaptive"}


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
        ({F + "enable": True, F + "metric": "''"}, ("filter_groups.metric is not set", "seq_reward")),
        ({"algorithm__adv_estimator": "gdpo"}, ("gdpo_reward_keys is not set", "in addition to its score")),
        (
            GDPO | {"algorithm__use_kl_in_reward": True},
            ("algorithm.use_kl_in_reward=True", "gdpo", "use actor_rollout_ref.actor.use_kl_loss=True"),
        ),
        (
            GDPO | {"algorithm__gdpo_reward_weights": "[0.0,0]"},
            ("gdpo_reward_weights=[0.0,0.0]", "every advantage would be 0", "null"),
        ),
        (GDPO | {"algorithm__gdpo_reward_keys": "[acc,acc]"}, ("gdpo_reward_keys=[acc,acc]", "duplicate name")),
        (GDPO | {"algorithm__gdpo_reward_keys": "[acc,'']"}, ("gdpo_reward_keys=[acc,]", "empty name")),
        (
            ADAPTIVE | {"algorithm__kl_ctrl__horizon": 6},
            ("kl_ctrl.horizon=6", "train_batch_size=8 x", "rollout.n=4", "use at least 7"),
        ),
        (
            ADAPTIVE | {"algorithm__kl_ctrl__kl_coef": 0},
            ("kl_ctrl.kl_coef=0", "type=adaptive", "stays 0", "0.001"),
        ),
        (
            {
                "algorithm__adv_estimator": "gdpo",
                "algorithm__gdpo_reward_keys": "[acc,form]",
                "algorithm__gdpo_reward_weights": "[1.0]",
            },
            ("gdpo_reward_weights=[1.0]: 1 weight(s) for 2", "[acc,form]"),
        ),
        ({"data__gen_batch_size": 16}, ("data.gen_batch_size=16", "filter_groups.enable=True")),
        ({**ON, "data__gen_batch_size": 41}, ("data.gen_batch_size=41", "only 40 prompts", "at most 40")),
        (
            {**ON, "data__gen_batch_size": 4, "data__train_batch_size": 44},
            ("data.train_batch_size=44", "only 40 prompts"),
        ),
    ],
)
def test_invalid_settings_are_errors(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


def test_valid_settings_have_a_plan(plan_of):
    plan = plan_of(**ON, **{F + "max_num_gen_batches": 4, "data__gen_batch_size": 2})
    assert plan.steps_per_epoch == 5
    plan_of(**ADAPTIVE, algorithm__kl_ctrl__horizon=7)
    plan_of(algorithm__kl_ctrl__type="adaptive", algorithm__kl_ctrl__horizon=1, algorithm__kl_ctrl__kl_coef=0)
    plan_of(algorithm__adv_estimator="gdpo", algorithm__gdpo_reward_keys="[acc,form]")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"algorithm__use_kl_in_reward": True, "actor_rollout_ref__actor__use_kl_loss": True},
            ("use_kl_in_reward", "twice"),
        ),
        (
            {"algorithm__use_kl_in_reward": True, "algorithm__kl_ctrl__kl_coef": 0},
            ("kl_ctrl.kl_coef=0", "has no effect"),
        ),
    ],
)
def test_probable_mistakes_are_warnings(plan_of, run_files, changes, words):
    plan = plan_of(critic__model__path=run_files.model, **changes)
    assert any(all(word in warning for word in words) for warning in plan.warnings)


def test_the_smallest_allowed_horizon_keeps_the_coefficient_above_zero():
    from verl.algorithms.kl_in_reward import AdaptiveKLController

    values = []
    for horizon in (6, 7):
        controller = AdaptiveKLController(0.1, 0.1, horizon)
        controller.update(0.0, 32)
        values.append(controller.value)
    assert values[0] <= 0 < values[1]
