import pytest

A = "actor_rollout_ref__actor__"
LOSS = A + "policy_loss__"


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
def test_a_loss_that_cannot_work(problem_of, changes, words):
    problem = problem_of(**changes)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "changes",
    [
        {LOSS + "loss_mode": "dro", LOSS + "dro_beta": 0.05},
        {LOSS + "loss_mode": "clip_cov"},
        {LOSS + "loss_mode": "cispo", A + "clip_ratio_low": 10},
        {LOSS + "loss_mode": "geo_mean", A + "clip_ratio_low": 0.4, A + "clip_ratio_high": 0.4},
        {LOSS + "loss_mode": "dppo_tv", A + "clip_ratio_low": 0.15, A + "clip_ratio_c": 10000},
    ],
)
def test_settings_in_use(plan_of, changes):
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
def test_ppos_bounds_on_other_losses(plan_of, loss, words):
    (warning,) = [line for line in plan_of(**{LOSS + "loss_mode": loss}).warnings if "clip_ratio" in line]
    assert all(word in warning for word in words), warning
    for changes in ({A + "clip_ratio_low": 3e-4}, {A + "clip_ratio_high": "null", A + "clip_ratio": 0.1}):
        plan = plan_of(**{LOSS + "loss_mode": loss}, **changes)
        assert not [line for line in plan.warnings if "clip_ratio" in line]


def test_a_bound_below_zero_is_none(plan_of):
    found = [line for line in plan_of(**{A + "clip_ratio_low": 10}).warnings if "clip_ratio_low=10" in line]
    assert len(found) == 1
