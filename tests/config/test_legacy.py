"""Old names of keys."""

import pytest

from verl.config import load_config
from verl.config.legacy import migrate


@pytest.mark.parametrize("old", ["reward_model.overlong_buffer", "custom_reward_function.overlong_buffer"])
def test_overlong_buffer_under_its_old_names(old, tmp_path):
    expected = {"overlong_buffer_cfg": {"enable": True, "len": 4}}
    config = load_config([f"+{old}.enable=True", f"+{old}.len=4", "reward_model.reward_manager=dapo"])
    assert config.reward.reward_kwargs == expected and config.reward.reward_manager.name == "dapo"
    section, name = old.split(".")
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [ppo_trainer, _self_]\n{section}: {{{name}: {{enable: True, len: 4}}}}\n"
    )
    assert load_config(config_path=tmp_path, config_name="mine").reward.reward_kwargs == expected
    config = load_config(["reward_model.overlong_buffer_cfg.len=4", "+reward_model.reward_kwargs.max_resp_len=9"])
    assert config.reward.reward_kwargs == {"overlong_buffer_cfg": {"len": 4}, "max_resp_len": 9}


def test_bypass_mode_under_its_old_name(tmp_path):
    old = "bypass_old_logprob_for_rollout"
    assert load_config([f"algorithm.rollout_correction.{old}=True"]).algorithm.rollout_correction.bypass_mode is True
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [ppo_trainer, _self_]\nalgorithm: {{rollout_correction: {{{old}: True}}}}\n"
    )
    config = load_config(config_path=tmp_path, config_name="mine")
    assert config.algorithm.rollout_correction.bypass_mode is True


def test_old_names_move_and_an_override_takes_precedence_over_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\n"
        "custom_reward_function: {path: old.py, name: f}\n"
        "reward_model: {reward_manager: naive, num_workers: 3}\n"
        "actor_rollout_ref: {actor: {grad_clip: 0.5}}\n"
        "ray_init: {num_cpus: 7}\n"
    )
    config = load_config(["custom_reward_function.path=new.py"], config_path=tmp_path, config_name="mine")
    assert (config.reward.custom_reward_function.path, config.reward.custom_reward_function.name) == ("new.py", "f")
    assert config.reward.num_workers == 3
    assert config.actor_rollout_ref.actor.optim.clip_grad == 0.5
    assert config.ray_kwargs.ray_init["num_cpus"] == 7


def test_critic_keys_under_their_old_names():
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


def test_own_keys_of_a_sampler_are_its_kwargs():
    overrides = ["data.sampler.class_path=a.py", "+data.sampler.bucket={size: 3}", "++data.sampler.tau=0.5"]
    section = load_config(overrides).data.sampler
    assert section.class_path == "a.py" and section.kwargs == {"bucket": {"size": 3}, "tau": 0.5}
    assert (section.tau, section["tau"], section.get("tau", 1), section.get("other", 1)) == (0.5, 0.5, 0.5, 1)
    assert "tau" in section and "other" not in section
    assert load_config(["data.sampler={class_name: B, tau: 2}"]).data.sampler.tau == 2
    assert load_config(["data.sampler.kwargs={tau: 2}", "data.sampler.kwargs.eta=1"]).data.sampler.eta == 1


def test_own_keys_of_a_sampler_are_read_from_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ndata:\n  sampler: {class_path: a.py, class_name: B, tau: 3}\n"
    )
    assert load_config(["data.sampler.eta=1"], tmp_path, "mine").data.sampler.kwargs == {"tau": 3, "eta": 1}


def test_the_section_model_config_of_overridden_fields_is_unwrapped(tmp_path):
    key = "actor_rollout_ref.model.override_config"
    for text in ("model_config.max_position_embeddings=9", "model_config={max_position_embeddings: 9}"):
        config = load_config([f"+{key}.{text}"])
        assert config.actor_rollout_ref.model.override_config == {"max_position_embeddings": 9}
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, _self_]\ncritic: {model: {override_config: {model_config: {rope_theta: 2}}}}\n"
    )
    assert load_config(config_path=tmp_path, config_name="mine").critic.model.override_config == {"rope_theta": 2}
