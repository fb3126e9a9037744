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
        ("actor_rollout_ref.rollout.multi_turn.tokenization_sanity_check_mode=strict", "leave it out"),
        ("+actor_rollout_ref.rollout.multi_turn.use_inference_chat_template=False", "leave it out"),
        ("critic.rollout_n=8", "leave it out and use actor_rollout_ref.rollout.n"),
        ("actor_rollout_ref.rollout.trace.backend=weave", "traces of samples"),
        ("trainer.profile_steps=[1,2]", "use trainer.timeline"),
        ("actor_rollout_ref.actor.use_gpg_loss=True", "policy_loss.loss_mode=gpg"),
        ("trainer.use_legacy_worker_impl=False", "leave it out"),
        ("critic.model.fsdp_config.grad_offload=True", "leave it out"),
        ("actor_rollout_ref.rollout.response_length=64", "data.max_response_length"),
    ],
)
def test_key_of_upstream_names_its_replacement(override, words):
    text = load_error(override)
    key = override.lstrip("+").split("=")[0].partition(".backend")[0]
    assert text.startswith((f"unknown key '{key}'; ", f"unknown keys '{key}.*'; ", f"{key} is now called ")), text
    assert words in text, text


def test_unknown_section_is_reported_once(tmp_path):
    given = ["reward_model.rollout.name=vllm", "reward.reward_model.rollout.n=1", "reward_model.micro_batch_size=2"]
    text = load_error(*given)
    assert text.startswith("unknown keys 'reward.reward_model.*'; reward models are not supported") and "\n" not in text
    assert "examples/reward_model" in text and "reward.custom_reward_function" in text
    (tmp_path / "mine.yaml").write_text("defaults: [ppo_trainer, _self_]\nreward_model: {rollout: {n: 1, name: x}}\n")
    assert load_error(config_path=tmp_path, config_name="mine") == text


@pytest.mark.parametrize("section", ["global_profiler", "actor_rollout_ref.actor.profiler", "critic.profiler"])
def test_profiler_section_is_reported_once_with_the_timeline(section):
    text = load_error(f"{section}.enable=True", f"{section}.tool=nsys")
    assert text.startswith(f"unknown keys '{section}.*'; ") and "trainer.timeline" in text and "\n" not in text


def test_hints_only_name_existing_keys():
    known = {*build.key_types(PPOConfig), *build.sections(PPOConfig)}
    for key, text in (*hints._KEYS.items(), *((f"{name}.", text) for name, text in hints._SECTIONS.items())):
        assert key not in known
        named = re.findall(r"\b(?:actor_rollout_ref|algorithm|reward|trainer)\.[a-z_.]+\b", text)
        assert all(name in known or key.startswith(f"{name}.") for name in named), (key, named)
