"""Keys and config names of upstream verl that do not exist here, and their replacements."""

from __future__ import annotations

_CORRECTION = "algorithm.rollout_correction."
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn."
_BYPASS = f"use {_CORRECTION}bypass_mode=True with {_CORRECTION}loss_type=reinforce"
_VETO = "a veto by single tokens is not supported; rollout_rs=seq_max_k2 rejects a sequence for its most distant token"
_PARTIAL = (
    "use actor_rollout_ref.rollout.partial_rollout=True: data.gen_batch_size prompts are in progress, and a step uses "
    "the first data.train_batch_size prompts that are finished"
)
_MODELS = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
_LENGTHS = "leave it out and use data.max_prompt_length and data.max_response_length, which are the limits"
_SAMPLES = "leave it out and use actor_rollout_ref.rollout.n"
_SKIP = "use skip.rollout.enable=True, with the steps in skip.rollout.steps and skip.rollout.dump_dir"
_KEYS = {
    **{f"actor_rollout_ref.rollout.{name}": _SKIP for name in ("skip_rollout", "skip_dump_dir")},
    "actor_rollout_ref.actor.use_token_level_loss": "use actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": (
        f"use {_CORRECTION}rollout_is=token, with the cap as {_CORRECTION}rollout_is_threshold"
    ),
    "actor_rollout_ref.actor.use_gpg_loss": "use actor_rollout_ref.actor.policy_loss.loss_mode=gpg",
    "actor_rollout_ref.actor.rollout_n": _SAMPLES,
    "critic.rollout_n": _SAMPLES,
    f"{_CORRECTION}use_pure_rollout_correction": _BYPASS,
    f"{_CORRECTION}use_policy_gradient": _BYPASS,
    f"{_CORRECTION}rollout_is_threshold_lower": f"use a band: {_CORRECTION}rollout_is_threshold='0.5_5.0'",
    f"{_CORRECTION}rollout_rs_threshold_lower": f"use a band: {_CORRECTION}rollout_rs_threshold='0.5_2.0'",
    f"{_CORRECTION}rollout_token_veto_threshold": _VETO,
    f"{_CORRECTION}rollout_is_veto_threshold": _VETO,
    "actor_rollout_ref.rollout.prompt_length": _LENGTHS,
    "actor_rollout_ref.rollout.response_length": _LENGTHS,
    "actor_rollout_ref.rollout.swap_space": "leave it out: the engine computes preempted requests again",
    "actor_rollout_ref.rollout.chat_scheduler": "use an agent loop: actor_rollout_ref.rollout.agent",
    "critic.nccl_timeout": "use actor_rollout_ref.nccl_timeout, which is the limit for all ranks of the trainer",
    "data.tokenizer": "use actor_rollout_ref.model.tokenizer_path",
    "trainer.remove_previous_ckpt_in_save": "use trainer.max_actor_ckpt_to_keep=1",
    "trainer.profile_steps": "use global_profiler.steps",
    "actor_rollout_ref.rollout.over_sample_rate": _PARTIAL,
    "async_training.compute_prox_log_prob": (
        f"leave it out for False; for True use {_CORRECTION}bypass_mode=False, with which the trainer computes "
        "old_log_probs"
    ),
    f"{_MULTI_TURN}max_turns": f"use {_MULTI_TURN}max_assistant_turns",
    **{
        f"reward.reward_model.rollout.{name}": "leave it out: the request of your reward function decides it"
        for name in ("temperature", "top_k", "top_p", "n", "do_sample", "ignore_eos")
    },
    **{f"{model}.grad_offload": "leave it out: gradients stay on the device" for model in _MODELS},
}
# Sections of upstream verl; one message covers all their unknown keys.
_SECTIONS = {
    "distillation.teacher_models": (
        "several teachers are not supported; use the keys of distillation.teacher_models.teacher_model, which scores "
        "every sample"
    ),
    "rollout": "keys of the replicas are in actor_rollout_ref.rollout",
    "actor_rollout_ref.rollout.trace": (
        "traces of samples are not supported; leave them out and use trainer.rollout_data_dir, which keeps the samples"
    ),
    "actor_rollout_ref.actor.router_replay": "routing replay is not supported; leave them out",
    **{
        f"{role}.{engine}": f"this training engine is not supported; leave them out and use {role}.strategy=fsdp2"
        for role in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
        for engine in ("veomni", "torchtitan")
    },
    "actor_rollout_ref.model.mtp": "multi-token prediction is not supported; leave them out",
    "skip.async_rollout": "a fully asynchronous run keeps no rollouts; leave them out",
    "actor_rollout_ref.rollout.skip": _SKIP,
    **{
        f"{model}.{section}": f"{feature} is not supported; leave them out"
        for model in _MODELS
        for section, feature in (("turbo_config", "the engine fsdp_turbo"), ("mixed_precision", "another precision"))
    },
    "trainer.npu_profile": "use global_profiler.tool=npu and actor_rollout_ref.actor.profiler",
}

# Config files of upstream verl for other training engines.
_CONFIG_NAMES = (
    "ppo_megatron_trainer",
    "ppo_veomni_trainer",
    "ppo_torchtitan_trainer",
    "one_step_off_ppo_megatron_trainer",
    "fully_async_ppo_megatron_trainer",
)


def upstream_key_hint(key: str) -> str | None:
    """Return the error text for an unknown key that upstream verl has; None for any other key.

    Args:
        key: dotted name, after `verl.config.legacy` moved it.
    """
    if key in _KEYS:
        return f"unknown key '{key}'; {_KEYS[key]}"
    return next(
        (f"unknown keys '{name}.*'; {text}" for name, text in _SECTIONS.items() if key.startswith(f"{name}.")), None
    )


def config_name_hint(name: str) -> str | None:
    """Return the error text for a `--config-name` that only upstream verl has; None for any other name."""
    if name.removesuffix(".yaml") not in _CONFIG_NAMES:
        return None
    return (
        f"--config-name={name}: FSDP2 is the only supported training engine; leave out --config-path, --config-name "
        "and the keys of other engines"
    )
