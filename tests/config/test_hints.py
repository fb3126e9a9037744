"""Hints for keys that only upstream verl has."""

import re

import pytest

from fixtures.config_error import load_error
from verl.config import PPOConfig, build, hints


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.actor.use_token_level_loss=True", "loss_agg_mode=token-mean"),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=2", "rollout_is=token, with the cap as"),
        ("algorithm.rollout_correction.use_pure_rollout_correction=True", "bypass_mode=True with"),
        ("algorithm.rollout_correction.use_policy_gradient=True", "loss_type=reinforce"),
        ("algorithm.rollout_correction.rollout_rs_threshold_lower=0.5", "rollout_rs_threshold='0.5_2.0'"),
        ("algorithm.rollout_correction.rollout_token_veto_threshold=1e-4", "a veto by single tokens is not supported"),
        ("critic.rollout_n=8", "leave it out and use actor_rollout_ref.rollout.n"),
        ("actor_rollout_ref.rollout.trace.backend=weave", "traces of samples"),
        ("trainer.profile_steps=[1,2]", "global_profiler.steps"),
        ("actor_rollout_ref.actor.use_gpg_loss=True", "policy_loss.loss_mode=gpg"),
        ("async_training.compute_prox_log_prob=True", "bypass_mode=False, with which the trainer computes"),
        ("critic.model.fsdp_config.grad_offload=True", "leave it out"),
        ("actor_rollout_ref.rollout.response_length=64", "data.max_response_length"),
        ("critic.nccl_timeout=7200", "actor_rollout_ref.nccl_timeout"),
    ],
)
def test_key_of_upstream_names_its_replacement(override, words):
    text = load_error(override)
    key = override.lstrip("+").split("=")[0].partition(".backend")[0]
    assert text.startswith((f"unknown key '{key}'; ", f"unknown keys '{key}.*'; ", f"{key} is now called ")), text
    assert words in text, text


def test_unknown_section_is_reported_once(tmp_path):
    text = load_error("rollout.n=4", "rollout.top_p=0.9")
    assert text.startswith("unknown keys 'rollout.*'; ") and "\n" not in text
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\nrollout: {n: 4, top_p: 0.9}\n")
    assert load_error(config_path=tmp_path, config_name="mine") == text


def test_section_of_the_replicas_names_the_section_here():
    assert (
        load_error("rollout.n=4") == "unknown keys 'rollout.*'; keys of the replicas are in actor_rollout_ref.rollout"
    )


def test_sampling_of_a_reward_model_is_left_to_its_requests():
    text = load_error("reward.reward_model.enable=True", "reward.reward_model.rollout.temperature=0.7")
    assert "unknown key 'reward.reward_model.rollout.temperature'" in text and "request of your reward function" in text


def test_hints_only_name_existing_keys():
    known = {*build.key_types(PPOConfig), *build.sections(PPOConfig)}
    for key, text in (*hints._KEYS.items(), *((f"{name}.", text) for name, text in hints._SECTIONS.items())):
        assert key not in known
        named = re.findall(r"\b(?:actor_rollout_ref|algorithm|reward|trainer)\.[a-z_.]+\b", text)
        assert all(name in known or key.startswith(f"{name}.") for name in named), (key, named)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actor_rollout_ref.model.mtp.enable=True", "actor_rollout_ref.model.mtp.method=x"], "multi-token prediction"),
        (["skip.async_rollout.enable=True", "skip.async_rollout.steps=[1]"], "asynchronous run keeps no rollouts"),
        (["+actor_rollout_ref.rollout.skip_rollout=True"], "use skip.rollout.enable=True"),
        (["+actor_rollout_ref.rollout.skip.enable=True"], "use skip.rollout.enable=True"),
        (
            ["reward.sandbox_fusion.url=x", "reward.sandbox_fusion.memory_limit_mb=2"],
            "'reward.sandbox_fusion.*'",
        ),
        (["actor_rollout_ref.actor.use_prefix_grouper=True"], "use False, or leave it out"),
        (["data.function_tool_path=a.py"], "use actor_rollout_ref.rollout.multi_turn.function_tool_path"),
    ],
)
def test_a_feature_of_upstream_is_one_error_without_a_guess(overrides, words):
    text = load_error(*overrides)
    assert words in text and "did you mean" not in text and "\n" not in text, text
