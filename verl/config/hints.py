"""Keys and config names of upstream verl that do not exist here, and their replacements."""

from __future__ import annotations

_CORRECTION = "algorithm.rollout_correction."
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn."
_TOKENS_KEPT = "leave it out: tokens of the model are kept as they were generated, so there is nothing to compare"
_BYPASS = f"use {_CORRECTION}bypass_mode=True with {_CORRECTION}loss_type=reinforce"
_VETO = "a veto by single tokens is not supported; rollout_rs=seq_max_k2 rejects a sequence for its most distant token"
_PARTIAL = (
    "use actor_rollout_ref.rollout.partial_rollout=True: data.gen_batch_size prompts are in progress, and a step uses "
    "the first data.train_batch_size prompts that are finished"
)
_LAG = "use trainer.rollout_lag=1"
_MODELS = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
_ONE_LOOP = "leave it out: there is only one implementation"
_LENGTHS = "leave it out and use data.max_prompt_length and data.max_response_length"
_IMAGES = "leave it out: images in prompts are not supported"
_SAMPLES = "leave it out and use actor_rollout_ref.rollout.n"
_KEYS = {
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
    "actor_rollout_ref.nccl_timeout": "leave it out: ranks wait at most 30 minutes for each other",
    "data.tokenizer": "use actor_rollout_ref.model.tokenizer_path",
    "data.return_multi_modal_inputs": _IMAGES,
    "data.image_patch_size": _IMAGES,
    "trainer.use_legacy_worker_impl": _ONE_LOOP,
    "trainer.ray_wait_register_center_timeout": "leave it out",
    "trainer.remove_previous_ckpt_in_save": "use trainer.max_actor_ckpt_to_keep=1",
    "trainer.profile_steps": "use trainer.timeline, which records every step",
    "actor_rollout_ref.rollout.over_sample_rate": _PARTIAL,
    f"{_MULTI_TURN}max_turns": f"use {_MULTI_TURN}max_assistant_turns",
    f"{_MULTI_TURN}tokenization_sanity_check_mode": _TOKENS_KEPT,
    f"{_MULTI_TURN}use_inference_chat_template": _TOKENS_KEPT,
    **{f"{model}.grad_offload": "leave it out: gradients stay on the device" for model in _MODELS},
}
_PROFILER = "device profilers are not supported; leave them out and use trainer.timeline, which shows all processes"
_PROFILED = ("critic", *(f"actor_rollout_ref.{role}" for role in ("actor", "ref", "rollout")))
# Sections of upstream verl; one message covers all their unknown keys.
_SECTIONS = {
    "reward.reward_model": (
        "reward models are not supported; leave them out and query one in "
        "reward.custom_reward_function, as in examples/reward_model"
    ),
    "async_training": (
        f"{_PARTIAL}; actor_rollout_ref.rollout.max_staleness limits their age. To generate the next batch during "
        f"training instead, {_LAG}"
    ),
    # From one_step_off_policy.
    "rollout": (
        "they are in actor_rollout_ref.rollout; this includes nnodes and n_gpus_per_node of one_step_off_policy, "
        f"for which you also {_LAG}"
    ),
    "actor_rollout_ref.rollout.trace": (
        "traces of samples are not supported; leave them out and use trainer.rollout_data_dir, which keeps the samples"
    ),
    "actor_rollout_ref.rollout.prometheus": "Prometheus is not supported; leave them out",
    "transfer_queue": "leave them out: samples pass through the driver",
    "actor_rollout_ref.actor.router_replay": "routing replay is not supported; leave them out",
    **{f"{model}.wrap_policy": "leave them out: each decoder layer is sharded separately" for model in _MODELS},
    **{
        f"{role}.{engine}": f"this training engine is not supported; leave them out and use {role}.strategy=fsdp2"
        for role in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
        for engine in ("veomni", "torchtitan")
    },
    "trainer.npu_profile": _PROFILER,
    "global_profiler": _PROFILER,
    **{f"{role}.profiler": _PROFILER for role in _PROFILED},
}

# Config files of upstream verl for other training engines.
_CONFIG_NAMES = ("ppo_megatron_trainer", "ppo_veomni_trainer", "ppo_torchtitan_trainer")


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
