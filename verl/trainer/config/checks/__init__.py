"""`check`: a config against the model, the data and the machine, before any process starts."""

from __future__ import annotations

from pathlib import Path

from verl.trainer.config.checks.agent import check_agent
from verl.trainer.config.checks.algorithm import check_algorithm
from verl.trainer.config.checks.batches import check_batches, check_replicas, rollout_devices, trainer_ranks
from verl.trainer.config.checks.critic import check_critic, check_critic_model
from verl.trainer.config.checks.data import DataInfo, check_data
from verl.trainer.config.checks.idle import idle_notes
from verl.trainer.config.checks.lag import check_lag
from verl.trainer.config.checks.lora import check_lora
from verl.trainer.config.checks.machine import (
    check_device,
    check_directories,
    check_loggers,
    check_memory,
    check_ports,
)
from verl.trainer.config.checks.model import check_model
from verl.trainer.config.checks.partial_rollout import check_partial_rollout
from verl.trainer.config.checks.policy_loss import check_policy_loss
from verl.trainer.config.checks.quantization import Quantisation, check_quantization
from verl.trainer.config.checks.reward import check_reward
from verl.trainer.config.checks.rollout_correction import check_rollout_correction
from verl.trainer.config.checks.transport import check_transport
from verl.trainer.config.critic import resolve_critic
from verl.trainer.config.delta import whole_updates_why
from verl.trainer.config.errors import ConfigError
from verl.trainer.config.estimate import estimate_memory
from verl.trainer.config.findings import Findings
from verl.trainer.config.model_files import ModelFiles
from verl.trainer.config.plan import CriticPlan, Plan
from verl.trainer.config.ppo import PPOConfig
from verl.trainer.config.schema import walk
from verl.trainer.config.values import value_problems
from verl.utils.platform import available_memory_bytes, choose_dtype, cpu_cores

_MIB = 1 << 20
_MOST_REWARD_WORKERS = 8
_ENGINE_KWARGS = ("vllm", "sglang", "trtllm")


def check(config: PPOConfig) -> Plan:
    """Check everything that can be checked without starting a process, and derive the plan.

    Raises:
        ConfigError: lists every problem: field, value, what to do.
    """
    wrong = value_problems(config)
    found = Findings(errors=list(wrong.values()))
    _check_engine_kwargs(config, found)
    # Arithmetic on sizes that are out of bounds would only add noise, or divide by zero.
    sizes_hold = not any(type(value) is int for name, _, value in walk(config) if name in wrong)
    if sizes_hold:
        check_batches(config, found)
        check_replicas(config, found)
        check_algorithm(config, found)
        check_critic(config, found)
        check_policy_loss(config, found)
        check_partial_rollout(config, found)
        check_ports(config, found)
    model = check_model(config, found) if sizes_hold else None
    critic = check_critic_model(config, model, found) if sizes_hold else None
    if model is not None and not wrong:
        check_lora(config, model, found)
    data = check_data(config, found)
    check_reward(config, found)
    check_agent(config, found)
    check_rollout_correction(config, found)
    check_loggers(config, found)
    check_directories(config, found)
    device = None if "trainer.device" in wrong else check_device(config, found)
    if device and sizes_hold and "actor_rollout_ref.rollout.checkpoint_engine.backend" not in wrong:
        check_transport(config, device, found)
    if device and sizes_hold:
        check_lag(config, device, found)
    quantisation = check_quantization(config, device, found) if device and model and not wrong else None
    if found.errors:
        raise ConfigError(found.errors)
    assert device is not None and model is not None
    plan = _derive(config, device, model, critic, data, quantisation)
    check_memory(plan.memory, plan.available_bytes, found)
    plan.warnings, plan.notes = found.warnings, found.notes + idle_notes(config, device)
    return plan


def _check_engine_kwargs(config: PPOConfig, found: Findings) -> None:
    kwargs = config.actor_rollout_ref.rollout.engine_kwargs
    for name, value in kwargs.items():
        field = f"actor_rollout_ref.rollout.engine_kwargs.{name}"
        if name not in _ENGINE_KWARGS:
            found.errors.append(f"{field}: there is no such key; use actor_rollout_ref.rollout.engine_kwargs.vllm")
        elif not isinstance(value, dict | None):
            found.errors.append(f"{field}={value}: give a mapping of arguments")
        elif name != "vllm" and value:
            found.errors.append(f"{field} is not supported yet: use actor_rollout_ref.rollout.engine_kwargs.vllm")


def _derive(
    config: PPOConfig,
    device: str,
    model: ModelFiles,
    critic: ModelFiles | None,
    data: DataInfo,
    quantisation: Quantisation | None,
) -> Plan:
    roles, trainer = config.actor_rollout_ref, config.trainer
    actor, rollout = roles.actor, roles.rollout
    ranks, samples = trainer_ranks(config), config.data.train_batch_size * rollout.n
    replicas = rollout_devices(config) // rollout.tensor_model_parallel_size
    mini = actor.ppo_mini_batch_size * rollout.n
    micro = None if actor.use_dynamic_bsz else mini // ranks // (actor.ppo_micro_batch_size_per_gpu or 1)
    compute, engine = choose_dtype(device, actor.fsdp_config.dtype), choose_dtype(device, rollout.dtype)
    workers = config.reward.num_workers or min(_MOST_REWARD_WORKERS, cpu_cores())
    steps = None if data.train is None else data.train // config.data.train_batch_size
    itemsize = 4 if engine.name == "float32" else 2
    update = None if model.parameters is None else model.parameters * itemsize
    if quantisation is not None:
        update = quantisation.update_bytes(itemsize) or update
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * _MIB
    return Plan(
        device=device,
        compute_dtype=compute.name,
        compute_why=compute.why,
        rollout_dtype=engine.name,
        rollout_why=engine.why,
        rollout_weights=None if quantisation is None else quantisation.summary(),
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
        reward_workers=workers,
        parameters=model.parameters,
        critic=None if critic is None else _critic(config, device, critic),
        update_bytes=update,
        update_buckets=None if update is None else -(-update // bucket),
        whole_updates_why=whole_updates_why(rollout, device),
        memory=estimate_memory(
            config,
            model,
            device=device,
            compute_dtype=compute.name,
            rollout_dtype=engine.name,
            ranks=ranks,
            replicas=replicas,
            reward_workers=workers,
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
    return f"{trainer.default_local_dir}, every {trainer.save_freq} steps, {kept} kept"


def _logs(config: PPOConfig) -> str:
    places = {"file": Path(config.trainer.default_local_dir) / "metrics.jsonl"}
    return ", ".join(f"{name} ({places[name]})" if name in places else name for name in config.trainer.logger) or "none"
