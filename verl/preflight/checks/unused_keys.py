"""Keys that were changed and have no effect in this run, because of the device or of another key."""

from __future__ import annotations

from collections.abc import Iterator

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.config.reward_kwargs import KWARGS, MANAGER_KWARGS
from verl.config.roles import needs_critic, needs_ref, resolve_critic
from verl.config.rollout_correction import PREFIX, resolve
from verl.config.schema import walk
from verl.config.weight_updates import full_update_reason, resolve_backend
from verl.preflight.checks.agent import rows_choose_loop

_ACTOR = "actor_rollout_ref.actor."
_REF = "actor_rollout_ref.ref."
_ROLLOUT = "actor_rollout_ref.rollout."
# By key: the estimators that read it.
_ESTIMATOR_KEYS = {
    "algorithm.gamma": ("gae", "reinforce_plus_plus"),
    "algorithm.lam": ("gae",),
    "algorithm.norm_adv_by_std_in_grpo": ("grpo", "grpo_vectorized", "grpo_passk", "gdpo"),
    "algorithm.gdpo_reward_weights": ("gdpo",),
}
# By key of the actor: the policy losses that read it.
_CLIPPED = ("vanilla", "gspo", "geo_mean", "clip_cov", "cispo", "dppo_tv", "dppo_kl")
_LOSS_KEYS = {
    "clip_ratio": _CLIPPED,
    "clip_ratio_low": _CLIPPED,
    "clip_ratio_high": _CLIPPED,
    "clip_ratio_c": ("vanilla", "dppo_tv", "dppo_kl"),
    "tau_pos": ("sapo",),
    "tau_neg": ("sapo",),
    "policy_loss.clip_cov_ratio": ("clip_cov",),
    "policy_loss.clip_cov_lb": ("clip_cov",),
    "policy_loss.clip_cov_ub": ("clip_cov",),
    "policy_loss.kl_cov_ratio": ("kl_cov",),
    "policy_loss.ppo_kl_coef": ("kl_cov",),
    "policy_loss.dro_beta": ("dro",),
}
# Losses with an aggregation of their own; loss_agg_mode is left to the entropy bonus and the KL loss.
_OWN_AGGREGATION = ("gspo", "sapo", "geo_mean")


def unused_key_notes(config: PPOConfig, device: str) -> list[str]:
    """One line a reason: the changed keys that it makes ineffective."""
    defaults = {name: value for name, _, value in walk(PPOConfig())}
    changed = {name for name, _, value in walk(config) if value != defaults[name]}
    changed |= {f"{KWARGS}.{name}" for name in config.reward.reward_kwargs}
    notes = []
    if device == "cpu":
        notes.append(
            "no effect on a CPU: rollout.gpu_memory_utilization, rollout.free_cache_engine, "
            "rollout.cudagraph_capture_sizes"
        )
    for reason, keys in _idle(config, device):
        named = sorted(
            name for name in changed for key in keys if name == key or (key[-1] == "." and name.startswith(key))
        )
        if named:
            notes.append(f"no effect {reason}: {', '.join(named)}")
    return notes


def _is_idle(estimator: str, users: tuple[str, ...]) -> bool:
    """Whether one of ours does not read a key; what the user's estimators read is not known."""
    return estimator in names.ADV_ESTIMATORS and estimator not in users


def _idle(config: PPOConfig, device: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    roles, trainer = config.actor_rollout_ref, config.trainer
    actor, rollout = roles.actor, roles.rollout
    algorithm = config.algorithm
    yield (
        f"on {algorithm.adv_estimator}",
        tuple(key for key, users in _ESTIMATOR_KEYS.items() if _is_idle(algorithm.adv_estimator, users)),
    )
    if _is_idle(algorithm.adv_estimator, ("gdpo",)) and config.reward.reward_manager.name != "gdpo":
        yield f"on {algorithm.adv_estimator} without the gdpo reward manager", ("algorithm.gdpo_reward_keys",)
    if not algorithm.use_kl_in_reward:
        yield "with algorithm.use_kl_in_reward=False", ("algorithm.kl_penalty", "algorithm.kl_ctrl.")
    elif algorithm.kl_ctrl.type == "fixed":
        keys = ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl")
        yield "with algorithm.kl_ctrl.type=fixed", keys
    if not algorithm.filter_groups.enable:
        yield "with algorithm.filter_groups.enable=False", ("algorithm.filter_groups.",)
    if actor.use_dynamic_bsz:
        yield "with actor.use_dynamic_bsz=True", (_ACTOR + "ppo_micro_batch_size_per_gpu",)
    elif rollout.log_prob_use_dynamic_bsz is not True and roles.ref.log_prob_use_dynamic_bsz is not True:
        yield "with actor.use_dynamic_bsz=False", (_ACTOR + "ppo_max_token_len_per_gpu",)
    for section, prefix in ((rollout, _ROLLOUT), (roles.ref, _REF)):
        dynamic = section.log_prob_use_dynamic_bsz
        if actor.use_dynamic_bsz if dynamic is None else dynamic:
            yield "with dynamic micro-batches", (prefix + "log_prob_micro_batch_size_per_gpu",)
        else:
            yield "without dynamic micro-batches", (prefix + "log_prob_max_token_len_per_gpu",)
    if not needs_ref(config):
        yield (
            "without a reference model (actor.use_kl_loss=False, algorithm.use_kl_in_reward=False)",
            (_REF,),
        )
    elif device == "cpu":
        yield "on a CPU, whose memory is the host's", (_REF + "fsdp_config.param_offload",)
    if roles.model.lora_rank == 0 and roles.model.lora_adapter_path is None:
        yield "without adapters (model.lora_rank=0)", ("actor_rollout_ref.model.lora_alpha",)
    if not actor.use_kl_loss:
        yield "with actor.use_kl_loss=False", (_ACTOR + "kl_loss_coef", _ACTOR + "kl_loss_type")
    correction = resolve(algorithm.rollout_correction)
    if correction.rollout_is is None:
        keys = (PREFIX + "rollout_is_threshold", PREFIX + "rollout_is_batch_normalize")
        yield "with algorithm.rollout_correction.rollout_is=null", keys
    if not correction.bypass_mode:
        yield "with algorithm.rollout_correction.bypass_mode=False", (PREFIX + "loss_type",)
    else:
        sizes = ("use_dynamic_bsz", "micro_batch_size_per_gpu", "max_token_len_per_gpu")
        yield "in bypass mode, which computes no old_log_probs", tuple(f"{_ROLLOUT}log_prob_{name}" for name in sizes)
    loss, reason = actor.policy_loss.loss_mode, f"on actor.policy_loss.loss_mode={actor.policy_loss.loss_mode}"
    if correction.bypass_mode:
        # its two losses read what these two do
        loss = "vanilla" if correction.loss_type == "ppo_clip" else "gpg"
        reason = f"in bypass mode with loss_type={correction.loss_type}"
        yield "in bypass mode", (_ACTOR + "policy_loss.loss_mode",)
    if loss in names.POLICY_LOSSES:
        yield reason, tuple(_ACTOR + name for name, users in _LOSS_KEYS.items() if loss not in users)
    if loss in _OWN_AGGREGATION and actor.entropy_coeff == 0 and not actor.use_kl_loss:
        yield f"{reason}, which aggregates in its own way", (_ACTOR + "loss_agg_mode", _ACTOR + "loss_scale_factor")
    elif actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield f"on actor.loss_agg_mode={actor.loss_agg_mode}", (_ACTOR + "loss_scale_factor",)
    if loss in _CLIPPED and actor.clip_ratio_low is not None and actor.clip_ratio_high is not None:
        yield "with clip_ratio_low and clip_ratio_high set", (_ACTOR + "clip_ratio",)
    if actor.optim.lr_scheduler_type != "cosine":
        yield f"on a {actor.optim.lr_scheduler_type} schedule", (_ACTOR + "optim.min_lr_ratio",)
    if (actor.optim.lr_warmup_steps or -1) >= 0:
        yield "with optim.lr_warmup_steps set", (_ACTOR + "optim.lr_warmup_steps_ratio",)
    yield from _idle_of_critic(config)
    if not rollout.val_kwargs.do_sample:
        sampling = tuple(f"{_ROLLOUT}val_kwargs.{name}" for name in ("temperature", "top_p", "top_k"))
        yield "on greedy validation (val_kwargs.do_sample=False)", sampling
    between_nodes = (_ROLLOUT + "checkpoint_engine.backend", _ROLLOUT + "checkpoint_engine.timeout")
    if not rollout.nnodes:
        yield "with rollout.nnodes=0", (_ROLLOUT + "n_gpus_per_node",)
    else:
        yield "with rollout.nnodes, where replicas have memory of their own", (_ROLLOUT + "free_cache_engine",)
    if not rollout.nnodes and config.trainer.nnodes == 1:
        yield "with rollout.nnodes=0 and trainer.nnodes=1", between_nodes
    elif resolve_backend(config, device) == "naive":
        yield "with rollout.checkpoint_engine.backend=naive", between_nodes
    if not rollout.server.enable_http:
        yield "with rollout.server.enable_http=False", (_ROLLOUT + "server.",)
    if rollout.agent.default_agent_loop == "single_turn_agent" and not rows_choose_loop(config):
        yield "with agent.default_agent_loop=single_turn_agent", (_ROLLOUT + "multi_turn.",)
    if rollout.quantization is None:
        keys = (_ROLLOUT + "quantization_config_file", _ROLLOUT + "quantization_side")
        yield "with rollout.quantization=null", keys
    whole = full_update_reason(rollout, device)
    if whole is not None:
        yield f"with {whole}", (_ROLLOUT + "checkpoint_engine.delta_check_interval",)
    if not rollout.partial_rollout:
        yield "with rollout.partial_rollout=False", (_ROLLOUT + "max_staleness",)
    if not rollout.calculate_log_probs:
        yield "with rollout.calculate_log_probs=False", (_ROLLOUT + "logprobs_mode",)
    if not config.data.shuffle and config.data.train_max_samples < 0:
        yield "with data.shuffle=False", ("data.seed",)
    if not config.data.filter_overlong_prompts:
        yield "with data.filter_overlong_prompts=False", ("data.filter_overlong_prompts_workers",)
    if trainer.total_training_steps is not None:
        yield "with trainer.total_training_steps set", ("trainer.total_epochs",)
    if trainer.resume_mode != "resume_path":
        yield f"with trainer.resume_mode={trainer.resume_mode}", ("trainer.resume_from_path",)
    if trainer.save_freq <= 0:
        yield (
            "without checkpoints (trainer.save_freq)",
            ("trainer.max_actor_ckpt_to_keep", _ACTOR + "checkpoint.save_contents"),
        )
    if config.reward.custom_reward_function.path is None:
        yield "with the built-in scorers", ("reward.custom_reward_function.name",)
    if config.reward.reward_manager.name != "dapo":
        managers = tuple(f"{KWARGS}.{name}" for name in MANAGER_KWARGS)
        yield f"on reward.reward_manager.name={config.reward.reward_manager.name}", managers


def _idle_of_critic(config: PPOConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if not needs_critic(config):
        yield f"without a critic (algorithm.adv_estimator={config.algorithm.adv_estimator})", ("critic.",)
        return
    critic = resolve_critic(config)
    limits = ("micro_batch_size_per_gpu", "max_token_len_per_gpu")
    idle, reason = limits if critic.use_dynamic_bsz else limits[::-1], "with" if critic.use_dynamic_bsz else "without"
    yield f"{reason} dynamic micro-batches", (f"critic.ppo_{idle[0]}", f"critic.forward_{idle[0]}")
    if critic.optim.lr_scheduler_type != "cosine":
        yield f"on a {critic.optim.lr_scheduler_type} schedule", ("critic.optim.min_lr_ratio",)
    if (critic.optim.lr_warmup_steps or -1) >= 0:
        yield "with critic.optim.lr_warmup_steps set", ("critic.optim.lr_warmup_steps_ratio",)
    if config.trainer.save_freq <= 0:
        yield "without checkpoints (trainer.save_freq)", ("critic.checkpoint.save_contents",)
    if "hf_model" not in critic.checkpoint.save_contents:
        yield "without hf_model in critic.checkpoint.save_contents", ("critic.model.tokenizer_path",)
