"""Keys that were changed and have no effect in this run, because of the device or of another key."""

from __future__ import annotations

from collections.abc import Iterator

from verl.trainer.config.checks.batches import needs_ref
from verl.trainer.config.ppo import PPOConfig
from verl.trainer.config.schema import walk

_ACTOR = "actor_rollout_ref.actor."
_REF = "actor_rollout_ref.ref."
_ROLLOUT = "actor_rollout_ref.rollout."


def idle_notes(config: PPOConfig, device: str) -> list[str]:
    """One line a reason: the changed keys that it makes ineffective."""
    defaults = {name: value for name, _, value in walk(PPOConfig())}
    changed = {name for name, _, value in walk(config) if value != defaults[name]}
    notes = []
    if device == "cpu":
        notes.append(
            "no effect on a CPU: rollout.gpu_memory_utilization, rollout.free_cache_engine, "
            "rollout.cudagraph_capture_sizes"
        )
    for reason, keys in _idle(config):
        named = sorted(
            name for name in changed for key in keys if name == key or (key[-1] == "." and name.startswith(key))
        )
        if named:
            notes.append(f"no effect {reason}: {', '.join(named)}")
    return notes


def _idle(config: PPOConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    roles, trainer = config.actor_rollout_ref, config.trainer
    actor, rollout = roles.actor, roles.rollout
    yield f"on {config.algorithm.adv_estimator}", ("algorithm.gamma", "algorithm.lam")
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
            "without a reference model (actor.use_kl_loss=False)",
            (_REF, _ACTOR + "kl_loss_coef", _ACTOR + "kl_loss_type"),
        )
    if actor.loss_agg_mode != "seq-mean-token-sum-norm":
        yield f"on actor.loss_agg_mode={actor.loss_agg_mode}", (_ACTOR + "loss_scale_factor",)
    if actor.clip_ratio_low is not None and actor.clip_ratio_high is not None:
        yield "with clip_ratio_low and clip_ratio_high set", (_ACTOR + "clip_ratio",)
    if actor.optim.lr_scheduler_type != "cosine":
        yield f"on a {actor.optim.lr_scheduler_type} schedule", (_ACTOR + "optim.min_lr_ratio",)
    if (actor.optim.lr_warmup_steps or -1) >= 0:
        yield "with optim.lr_warmup_steps set", (_ACTOR + "optim.lr_warmup_steps_ratio",)
    if not rollout.val_kwargs.do_sample:
        sampling = tuple(f"{_ROLLOUT}val_kwargs.{name}" for name in ("temperature", "top_p", "top_k"))
        yield "on greedy validation (val_kwargs.do_sample=False)", sampling
    if not rollout.nnodes:
        yield "with rollout.nnodes=0", (_ROLLOUT + "n_gpus_per_node",)
    if not rollout.server.enable_http:
        yield "with rollout.server.enable_http=False", (_ROLLOUT + "server.",)
    if rollout.quantization is None:
        keys = (_ROLLOUT + "quantization_config_file", _ROLLOUT + "quantization_side")
        yield "with rollout.quantization=null", keys
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
