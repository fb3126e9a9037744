"""Derive the plan of a config that passed its checks."""

from __future__ import annotations

from pathlib import Path

from verl.config.engine_pools import EnginePool
from verl.config.ppo import PPOConfig
from verl.config.qat import policy_dtype, qat_mode
from verl.config.rank_groups import actor_ranks_per_sample, critic_ranks_per_sample
from verl.config.record import VAL_ONLY_DIRECTORY
from verl.config.roles import resolve_critic
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel
from verl.config.stream import training_steps
from verl.config.weight_updates import full_update_reason, resolve_backend
from verl.preflight.checks.data import DataInfo
from verl.preflight.estimate import ServedModels, estimate_memory
from verl.preflight.placement import replica_count, replica_nodes, shard_count, trainer_ranks
from verl.preflight.plan import CriticPlan, Plan
from verl.utils.byte_size import MIB
from verl.utils.dtypes import choose_dtype, itemsize_of
from verl.utils.host import available_memory_bytes
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import WeightFormat


def derive_plan(
    config: PPOConfig,
    device: str,
    model: ModelFiles,
    critic: ModelFiles | None,
    served: ServedModels,
    data: DataInfo,
    quantization: WeightFormat | None,
) -> Plan:
    """Return sizes, dtypes, processes and memory of the run; None stands for no critic or quantization."""
    actor, rollout, trainer = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.trainer
    ranks, replicas, samples = trainer_ranks(config), replica_count(config), config.data.train_batch_size * rollout.n
    mini, shared = actor.ppo_mini_batch_size * rollout.n, actor_sequence_parallel(actor)
    share = mini // shard_count(config, actor_ranks_per_sample(actor))
    micro = None if actor.use_dynamic_bsz else -(-share // (actor.ppo_micro_batch_size_per_gpu or 1))
    compute, engine = policy_dtype(device, actor.fsdp_config, rollout), choose_dtype(device, rollout.dtype)
    steps = None if data.train_per_epoch is None else data.train_per_epoch // config.data.train_batch_size
    update = _update_bytes(model, quantization, itemsize_of(engine.name))
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * MIB
    return Plan(
        device=device,
        compute_dtype=compute.name,
        compute_why=compute.why,
        rollout_dtype=engine.name,
        rollout_why=engine.why,
        rollout_weights=None if quantization is None else quantization.summary(),
        weight_error=None if quantization is None else quantization.weight_error,
        qat=qat_mode(actor.fsdp_config, rollout),
        master_dtype=choose_dtype(device, actor.fsdp_config.model_dtype).name,
        prompts_per_step=config.data.train_batch_size,
        samples_per_step=samples,
        optimizer_steps_per_step=samples // mini * actor.ppo_epochs,
        samples_per_mini_batch=mini,
        samples_per_rank=share,
        sequence_parallel=shared,
        layer_parallel=actor.fsdp_config.tensor_parallel_size,
        micro_batches_per_rank=micro,
        micro_batch_tokens=actor.ppo_max_token_len_per_gpu * shared if actor.use_dynamic_bsz else None,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=config.data.max_response_length,
        train_prompts=data.train,
        val_prompts=data.val,
        at_most=config.data.filter_overlong_prompts,
        steps_per_epoch=steps,
        total_steps=_total_steps(config, data.train_per_epoch),
        trainer_ranks=ranks,
        replicas=replicas,
        tensor_parallel=rollout.tensor_model_parallel_size,
        expert_parallel=rollout.expert_parallel_size,
        reward_workers=config.reward.workers,
        trainer_nodes=trainer.nnodes,
        replica_nodes=replica_nodes(config, device),
        transport=resolve_backend(config, device),
        parameters=model.parameters,
        critic=None if critic is None else _critic_plan(config, device, critic),
        update_bytes=update,
        update_buckets=None if update is None else -(-update // bucket),
        full_update_reason=full_update_reason(rollout, device),
        served=[(pool.model, _served_text(config, pool, files)) for pool, files in served],
        memory=estimate_memory(config, model, critic, served, device),
        available_bytes=available_memory_bytes(),
        checkpoints=_checkpoints_text(config),
        logs=_logs_text(config),
    )


def _total_steps(config: PPOConfig, prompts_per_epoch: int | None) -> int | None:
    """Return the training steps of the run; None if they are not known before the start."""
    if prompts_per_epoch is None and not config.trainer.total_training_steps:
        return None
    return training_steps(config, prompts_per_epoch or 0)


def _update_bytes(model: ModelFiles, quantization: WeightFormat | None, itemsize: int) -> int | None:
    """Return the size of a full update, with unquantized weights of `itemsize` bytes; None if it is not known."""
    full = None if model.parameters is None else model.parameters * itemsize
    return full if quantization is None else quantization.update_bytes(itemsize) or full


def _critic_plan(config: PPOConfig, device: str, files: ModelFiles) -> CriticPlan:
    critic = resolve_critic(config)
    n, prompts = config.actor_rollout_ref.rollout.n, critic.ppo_mini_batch_size or 1
    shared = critic_sequence_parallel(critic)
    return CriticPlan(
        parameters=files.parameters,
        compute_dtype=choose_dtype(device, critic.fsdp.compute_dtype).name,
        master_dtype=choose_dtype(device, critic.fsdp.model_dtype).name,
        optimizer_steps_per_step=config.data.train_batch_size // prompts * (critic.ppo_epochs or 1),
        samples_per_mini_batch=prompts * n,
        samples_per_rank=prompts * n // shard_count(config, critic_ranks_per_sample(critic)),
        sequence_parallel=shared,
    )


def _served_text(config: PPOConfig, pool: EnginePool, files: ModelFiles) -> str:
    text = f"{files.path.name}, {pool.summary}"
    if pool.section != "distillation":
        scores = config.reward.scored_by_model
        return f"{text}; {'scores the responses' if scores else 'asked by the reward function'}"
    loss = config.distillation.distillation_loss
    return f"{text}; loss {loss.loss_mode} {'and task rewards' if loss.use_task_rewards else 'alone'}"


def _checkpoints_text(config: PPOConfig) -> str:
    trainer = config.trainer
    if trainer.save_freq <= 0:
        return "none (trainer.save_freq)"
    kept = "all" if trainer.max_actor_ckpt_to_keep is None else f"the last {trainer.max_actor_ckpt_to_keep}"
    return f"{trainer.default_local_dir}, every {trainer.save_freq} steps and after the last step, {kept} kept"


def _logs_text(config: PPOConfig) -> str:
    directory = Path(config.trainer.default_local_dir)
    if config.trainer.val_only:
        directory = directory / VAL_ONLY_DIRECTORY / "global_step_N"
    files = {"file": directory / "metrics.jsonl"}
    return ", ".join(f"{name} ({files[name]})" if name in files else name for name in config.trainer.logger) or "none"
