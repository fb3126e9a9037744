"""The plan of a config that passed its checks."""

from __future__ import annotations

from pathlib import Path

from verl.config.ppo import PPOConfig
from verl.config.roles import resolve_critic
from verl.config.weight_updates import full_update_reason, resolve_backend
from verl.preflight.checks.batches import rollout_devices, trainer_ranks
from verl.preflight.checks.data import DataInfo
from verl.preflight.checks.transport import replica_nodes
from verl.preflight.estimate import estimate_memory
from verl.preflight.plan import CriticPlan, Plan
from verl.utils.dtypes import choose_dtype
from verl.utils.host import available_memory_bytes
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import WeightFormat

_MIB = 1 << 20


def derive_plan(
    config: PPOConfig,
    device: str,
    model: ModelFiles,
    critic: ModelFiles | None,
    data: DataInfo,
    quantization: WeightFormat | None,
) -> Plan:
    """Sizes, dtypes, processes and memory of the run."""
    roles, trainer = config.actor_rollout_ref, config.trainer
    actor, rollout = roles.actor, roles.rollout
    ranks, samples = trainer_ranks(config), config.data.train_batch_size * rollout.n
    replicas = rollout_devices(config) // rollout.tensor_model_parallel_size
    mini = actor.ppo_mini_batch_size * rollout.n
    micro = None if actor.use_dynamic_bsz else mini // ranks // (actor.ppo_micro_batch_size_per_gpu or 1)
    compute, engine = choose_dtype(device, actor.fsdp_config.dtype), choose_dtype(device, rollout.dtype)
    steps = None if data.train is None else data.train // config.data.train_batch_size
    itemsize = 4 if engine.name == "float32" else 2
    update = None if model.parameters is None else model.parameters * itemsize
    if quantization is not None:
        update = quantization.update_bytes(itemsize) or update
    bucket, apart = rollout.checkpoint_engine.update_weights_bucket_megabytes * _MIB, replica_nodes(config, device)
    return Plan(
        device=device,
        compute_dtype=compute.name,
        compute_why=compute.why,
        rollout_dtype=engine.name,
        rollout_why=engine.why,
        rollout_weights=None if quantization is None else quantization.summary(),
        master_dtype=choose_dtype(device, actor.fsdp_config.model_dtype).name,
        prompts_per_step=config.data.train_batch_size,
        samples_per_step=samples,
        optimizer_steps_per_step=samples // mini * actor.ppo_epochs,
        samples_per_mini_batch=mini,
        samples_per_rank=mini // ranks,
        micro_batches_per_rank=micro,
        micro_batch_tokens=actor.ppo_max_token_len_per_gpu if actor.use_dynamic_bsz else None,
        prompt_tokens=config.data.max_prompt_length,
        response_tokens=config.data.max_response_length,
        train_prompts=data.train,
        val_prompts=data.val,
        at_most=config.data.filter_overlong_prompts,
        steps_per_epoch=steps,
        total_steps=trainer.total_training_steps or (steps and steps * trainer.total_epochs),
        trainer_ranks=ranks,
        replicas=replicas,
        tensor_parallel=rollout.tensor_model_parallel_size,
        reward_workers=config.reward.workers,
        trainer_nodes=trainer.nnodes,
        replica_nodes=apart,
        transport=resolve_backend(config, device),
        parameters=model.parameters,
        critic=None if critic is None else _critic(config, device, critic),
        update_bytes=update,
        update_buckets=None if update is None else -(-update // bucket),
        full_update_reason=full_update_reason(rollout, device),
        memory=estimate_memory(
            config,
            model,
            device=device,
            compute_dtype=compute.name,
            rollout_dtype=engine.name,
            ranks=ranks,
            replicas=replicas,
            reward_workers=config.reward.workers,
            apart=apart > 0,
            critic=critic,
        ),
        available_bytes=available_memory_bytes(),
        checkpoints=_checkpoints(config),
        logs=_logs(config),
    )


def _critic(config: PPOConfig, device: str, files: ModelFiles) -> CriticPlan:
    critic = resolve_critic(config)
    n, prompts = config.actor_rollout_ref.rollout.n, critic.ppo_mini_batch_size or 1
    return CriticPlan(
        parameters=files.parameters,
        compute_dtype=choose_dtype(device, critic.fsdp.dtype).name,
        master_dtype=choose_dtype(device, critic.fsdp.model_dtype).name,
        optimizer_steps_per_step=config.data.train_batch_size // prompts * (critic.ppo_epochs or 1),
        samples_per_mini_batch=prompts * n,
        samples_per_rank=prompts * n // trainer_ranks(config),
    )


def _checkpoints(config: PPOConfig) -> str:
    trainer = config.trainer
    if trainer.save_freq <= 0:
        return "none (trainer.save_freq)"
    kept = "all" if trainer.max_actor_ckpt_to_keep is None else f"the last {trainer.max_actor_ckpt_to_keep}"
    return f"{trainer.default_local_dir}, every {trainer.save_freq} steps and after the last, {kept} kept"


def _logs(config: PPOConfig) -> str:
    places = {"file": Path(config.trainer.default_local_dir) / "metrics.jsonl"}
    return ", ".join(f"{name} ({places[name]})" if name in places else name for name in config.trainer.logger) or "none"
