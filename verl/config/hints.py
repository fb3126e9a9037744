"""Keys of verl that do not exist here: what to use in their place."""

from __future__ import annotations

_CORRECTION = "algorithm.rollout_correction."
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn."
_KEPT = "the model's tokens are kept as they were generated, so that there is nothing to compare; leave it out"
_BYPASS = f"use {_CORRECTION}bypass_mode=True with {_CORRECTION}loss_type=reinforce"
_VETO = "there is no veto by one token; rollout_rs=seq_max_k2 rejects a sequence for its farthest token"
_PARTIAL = (
    "use actor_rollout_ref.rollout.partial_rollout=True: data.gen_batch_size prompts are under way, and a step takes "
    "the first data.train_batch_size that are done"
)
_LAG = "use trainer.rollout_lag=1"
_MODELS = ("actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.ref.fsdp_config", "critic.fsdp")
_ONE_LOOP = "leave it out: there is one implementation"
_LENGTHS = "leave it out, data.max_prompt_length and data.max_response_length count"
_IMAGES = "images in prompts are not supported yet; leave it out"
_HINTS = {
    "actor_rollout_ref.actor.use_token_level_loss": "use actor_rollout_ref.actor.loss_agg_mode=token-mean",
    "actor_rollout_ref.actor.tis_imp_ratio_cap": (
        f"use {_CORRECTION}rollout_is=token, with the cap as {_CORRECTION}rollout_is_threshold"
    ),
    "actor_rollout_ref.actor.use_gpg_loss": "use actor_rollout_ref.actor.policy_loss.loss_mode=gpg",
    "actor_rollout_ref.actor.rollout_n": "leave it out, actor_rollout_ref.rollout.n counts",
    "critic.rollout_n": "leave it out, actor_rollout_ref.rollout.n counts",
    f"{_CORRECTION}use_pure_rollout_correction": _BYPASS,
    f"{_CORRECTION}use_policy_gradient": _BYPASS,
    f"{_CORRECTION}rollout_is_threshold_lower": f"give a band: {_CORRECTION}rollout_is_threshold='0.5_5.0'",
    f"{_CORRECTION}rollout_rs_threshold_lower": f"give a band: {_CORRECTION}rollout_rs_threshold='0.5_2.0'",
    f"{_CORRECTION}rollout_token_veto_threshold": _VETO,
    f"{_CORRECTION}rollout_is_veto_threshold": _VETO,
    "actor_rollout_ref.rollout.prompt_length": _LENGTHS,
    "actor_rollout_ref.rollout.response_length": _LENGTHS,
    "actor_rollout_ref.rollout.swap_space": "leave it out: what the engine preempts it computes again",
    "actor_rollout_ref.rollout.chat_scheduler": "write an agent loop: actor_rollout_ref.rollout.agent",
    "actor_rollout_ref.nccl_timeout": "leave it out: ranks wait 30 minutes for each other",
    "data.tokenizer": "use actor_rollout_ref.model.tokenizer_path",
    "data.return_multi_modal_inputs": _IMAGES,
    "data.image_patch_size": _IMAGES,
    "trainer.use_legacy_worker_impl": _ONE_LOOP,
    "trainer.ray_wait_register_center_timeout": "leave it out",
    "trainer.remove_previous_ckpt_in_save": "use trainer.max_actor_ckpt_to_keep=1",
    "trainer.profile_steps": "use trainer.timeline, which holds every step",
    "actor_rollout_ref.rollout.over_sample_rate": _PARTIAL,
    f"{_MULTI_TURN}max_turns": f"use {_MULTI_TURN}max_assistant_turns",
    f"{_MULTI_TURN}tokenization_sanity_check_mode": _KEPT,
    f"{_MULTI_TURN}use_inference_chat_template": _KEPT,
    **{f"{model}.grad_offload": "leave it out: gradients stay on the device" for model in _MODELS},
}
_PROFILER = "{}: device profilers are not run here; leave its keys out, trainer.timeline shows what each process does"
_PROFILED = ("critic", *(f"actor_rollout_ref.{role}" for role in ("actor", "ref", "rollout")))
# Whole sections, said once however many of their keys are given.
_SECTIONS = {
    "reward.reward_model.": (
        "reward.reward_model: reward models are not run here; leave all keys of this section out and let "
        "reward.custom_reward_function ask one, as in examples/reward_model"
    ),
    "async_training.": (
        f"async_training: there is no such section; {_PARTIAL}; actor_rollout_ref.rollout.max_staleness bounds how "
        f"old. To generate one whole batch ahead instead, {_LAG}"
    ),
    # of one_step_off_policy
    "rollout.": (
        "rollout: there is no such section; its keys are in actor_rollout_ref.rollout, nnodes and n_gpus_per_node of "
        f"one_step_off_policy too, beside which {_LAG}"
    ),
    "actor_rollout_ref.rollout.trace.": (
        "actor_rollout_ref.rollout.trace: traces of samples are not written here; leave its keys out, "
        "trainer.rollout_data_dir keeps the samples"
    ),
    "actor_rollout_ref.rollout.prometheus.": (
        "actor_rollout_ref.rollout.prometheus: nothing is set up for Prometheus here; leave its keys out"
    ),
    "data.sampler.": (
        "data.sampler: other samplers are not supported yet; leave its keys out, data.shuffle, data.seed and a dataset "
        "class of your own (data.custom_cls) decide the order"
    ),
    "transfer_queue.": "transfer_queue: there is no such section; leave its keys out, samples pass through the driver",
    "actor_rollout_ref.actor.router_replay.": (
        "actor_rollout_ref.actor.router_replay: routing replay is not supported yet; leave its keys out"
    ),
    **{
        f"{model}.wrap_policy.": f"{model}.wrap_policy: leave its keys out: each decoder layer is sharded by itself"
        for model in _MODELS
    },
    **{
        f"{role}.{engine}.": f"{role}.{engine}: this training engine is not supported yet; leave its keys out, and use "
        f"{role}.strategy=fsdp2"
        for role in ("actor_rollout_ref.actor", "actor_rollout_ref.ref", "critic")
        for engine in ("veomni", "torchtitan")
    },
    "trainer.npu_profile.": _PROFILER.format("trainer.npu_profile"),
    "global_profiler.": _PROFILER.format("global_profiler"),
    **{f"{role}.profiler.": _PROFILER.format(f"{role}.profiler") for role in _PROFILED},
}

# Config files of verl for other training engines.
_CONFIG_NAMES = ("ppo_megatron_trainer", "ppo_veomni_trainer", "ppo_torchtitan_trainer")


def config_name_hint(name: str) -> str | None:
    """What to say about a `--config-name` of verl's that is not here; None for any other."""
    if name.removesuffix(".yaml") not in _CONFIG_NAMES:
        return None
    return (
        f"--config-name={name}: FSDP2 is the only training engine so far; leave --config-path and --config-name out, "
        "and the keys of its sections"
    )


def hint(key: str) -> str | None:
    """What to say about an unknown key (dotted, by its present name); None for one that verl has not either."""
    if key in _HINTS:
        return f"{key}: there is no such key; {_HINTS[key]}"
    return next((text for section, text in _SECTIONS.items() if key.startswith(section)), None)
