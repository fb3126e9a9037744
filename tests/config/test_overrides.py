"""`prepare`: overrides that cannot be used, and the keys that the user may have meant."""

import pytest

from fixtures.config_error import load_error


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("trainer.total_epoch=3", "trainer.total_epochs"),
        ("+trainer.total_epoch=3", "trainer.total_epochs"),
        ("++data.train_batchsize=3", "data.train_batch_size"),
        ("actor_rollout_ref.actor.kl_coef=0.1", "actor_rollout_ref.actor.kl_loss_coef' or 'algorithm.kl_ctrl.kl_coef"),
        ("actor_rollout_ref.model.max_prompt_length=5", "data.max_prompt_length"),
        ("algorithm.adv_estimater=grpo", "algorithm.adv_estimator"),
        ("trainer.n_gpu_per_node=1", "trainer.n_gpus_per_node"),
        ("actor_rollout_ref.rollout.val_kwargs.temprature=1", "actor_rollout_ref.rollout.val_kwargs.temperature"),
    ],
)
def test_unknown_key_suggests_the_nearest(override, nearest):
    text = load_error(override)
    assert override.lstrip("+").split("=")[0] in text and f"did you mean '{nearest}'?" in text


def test_unknown_key_without_a_similar_key():
    assert "unknown key" in load_error("xyzzy.plugh=1")
    assert "unknown key 'xyzzy/plugh'" in load_error("xyzzy/plugh=1")
    assert "unknown key 'trainer.project_name.x'" in load_error("trainer.project_name.x=1")
    text = load_error("xyzzy=1", "trainer.seed=${no.where}")
    assert "unknown key 'xyzzy'; docs/config.md lists all keys" in text and "trainer.seed: " in text


@pytest.mark.parametrize(
    "override", ["trainer.max_stairs=1", "actor_rollout_ref.actor.clip_ration=1", "nothing.here=1"]
)
def test_unknown_key_does_not_suggest_keys_that_only_share_the_section(override):
    text = load_error(override)
    assert text.endswith(("; docs/config.md lists all keys", "did you mean 'actor_rollout_ref.actor.clip_ratio'?")), (
        text
    )


def test_error_of_a_moved_key_contains_its_old_name():
    text = load_error("custom_reward_function.pth=x")
    assert text.startswith("custom_reward_function.pth is now called reward.custom_reward_function.pth: unknown key")


def test_section_needs_a_key():
    assert "trainer is a section" in load_error("trainer=3")


@pytest.mark.parametrize(
    "override", ["~trainer.total_epochs", "trainer.logger=console,file", "trainer.total_epochs", "data.seed=[1"]
)
def test_overrides_that_do_not_set_one_value(override):
    text = load_error(override)
    assert override.lstrip("~").split("=")[0] in text and "Error" not in text
