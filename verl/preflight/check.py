"""Check a config against the model, the data and the machine before any process starts: `check` and `examine`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.schema import walk
from verl.config.values import value_problems
from verl.preflight.checks.actor import check_actor
from verl.preflight.checks.agent import check_agent
from verl.preflight.checks.algorithm import check_algorithm
from verl.preflight.checks.async_training import check_async_training
from verl.preflight.checks.critic import check_critic, check_critic_model
from verl.preflight.checks.data import DataInfo, check_data
from verl.preflight.checks.data_rows import check_rows
from verl.preflight.checks.distillation import check_distillation
from verl.preflight.checks.expert_parallel import check_expert_placement
from verl.preflight.checks.fsdp import check_fsdp
from verl.preflight.checks.library_arguments import check_engine_arguments, check_ray_arguments
from verl.preflight.checks.lora import check_lora
from verl.preflight.checks.memory import check_device_memory, check_host_memory
from verl.preflight.checks.model import check_latent_attention, check_model
from verl.preflight.checks.old_log_probs import check_old_log_probs
from verl.preflight.checks.profiler import check_profiler
from verl.preflight.checks.qat import check_qat
from verl.preflight.checks.quantization import check_planned_quantization, check_quantization
from verl.preflight.checks.quantization_guard import check_quantization_guard
from verl.preflight.checks.resume import check_contents, check_resume, check_steps_left, describe_resume
from verl.preflight.checks.reward import check_reward
from verl.preflight.checks.reward_model import check_reward_model
from verl.preflight.checks.rollout import (
    check_carried_prompts,
    check_engine_kwargs,
    check_rollout,
    check_transport,
)
from verl.preflight.checks.rollout_correction import check_rollout_correction
from verl.preflight.checks.sampling_mask import check_sampling_mask
from verl.preflight.checks.sequence_parallel import check_sequence_parallel
from verl.preflight.checks.skip import check_skip
from verl.preflight.checks.tensor_parallel import check_tensor_parallel
from verl.preflight.checks.trainer import (
    check_critic_warmup,
    check_device,
    check_directories,
    check_environment,
    check_loggers,
    check_python_of_workers,
    check_rollout_lag,
)
from verl.preflight.checks.unused_keys import unused_key_notes
from verl.preflight.derive_plan import derive_plan
from verl.preflight.device_memory import DeviceMemory, device_memory
from verl.preflight.estimate import ServedModels, estimate_memory
from verl.preflight.findings import Findings
from verl.preflight.plan import Plan, PromptLengths
from verl.preflight.target import Hardware, Target
from verl.utils.dtypes import itemsize_of
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import WeightFormat

_NONE: Mapping[str, str] = MappingProxyType({})


def check(config: PPOConfig, problems: Mapping[str, str] = _NONE, notes: Sequence[str] = ()) -> Plan:
    """Check a run that starts now on this machine, and return its plan.

    Args:
        problems, notes: see `examine`.

    Raises:
        ConfigError: lists every problem: field, value, what to do.
    """
    plan, found = examine(config, Target(), problems, notes)
    if plan is None or found.errors:
        raise ConfigError(found.errors)
    return plan


@dataclass
class _Inputs:
    """Inputs of the plan, as far as the checks could determine them; None: not known, or not part of the run.

    Attributes:
        device: `cpu`, `cuda` or `npu`.
        model, critic: files of the policy's and the critic's model.
        served: the teacher and the reward model.
        data: numbers of rows.
        prompt_lengths: lengths of a sample of the training prompts.
        quantization: the engine's format of quantized weights.
        valid: no error affects the numbers of the plan.
    """

    device: str | None
    model: ModelFiles | None
    critic: ModelFiles | None
    served: ServedModels
    data: DataInfo
    prompt_lengths: PromptLengths | None
    quantization: WeightFormat | None
    valid: bool


def examine(
    config: PPOConfig, target: Target, problems: Mapping[str, str] = _NONE, notes: Sequence[str] = ()
) -> tuple[Plan | None, Findings]:
    """Run every check that needs no other process, and derive the plan.

    Args:
        problems: errors of `verl.config.load`, by key. Known keys among them have their defaults.
        notes: notes of `verl.config.load`.

    Returns:
        The plan and the findings. The plan is None if errors affect its numbers, or if a run that starts has errors.
    """
    known = {name for name, *_ in walk(config)}
    invalid = value_problems(config) | {name: text for name, text in problems.items() if name in known}
    # A section is reported once, for all its keys.
    errors = list(dict.fromkeys([*problems.values(), *invalid.values()]))
    found = Findings(errors=errors, notes=list(notes), without_files=target.without_files)
    inputs = _check_sections(config, target, set(invalid), found)
    device, model = inputs.device, inputs.model
    if device is not None:
        found.notes += unused_key_notes(config, device)
    if device is None or model is None or not inputs.valid or (target.starting and found.errors):
        return None, found
    plan = derive_plan(config, device, model, inputs.critic, inputs.served, inputs.data, inputs.quantization)
    plan.prompt_lengths = inputs.prompt_lengths
    if target.hardware is None:
        plan.resume = describe_resume(config, device)
        check_steps_left(config, plan.total_steps, found)
    if target.hardware is not None:
        plan.hardware, plan.available_bytes = target.hardware.name, None
        plan.device_memory = _device_memory(config, target.hardware, plan, model, inputs)
        if plan.device_memory is not None:
            estimate = functools.partial(_other_memory, device, target.hardware, plan, model, inputs)
            check_device_memory(config, plan.device_memory, estimate, found)
    check_host_memory(plan.memory, plan.available_bytes, found)
    plan.warnings, plan.notes = found.warnings, found.notes
    return plan if found.sizes_fit else None, found


def _check_sections(config: PPOConfig, target: Target, invalid: set[str], found: Findings) -> _Inputs:
    """Run the checks of every section.

    Args:
        invalid: keys with a value that is invalid by itself.
    """
    model = critic = quantization = None
    served: ServedModels = []
    check_engine_kwargs(config, found)
    check_engine_arguments(config, target, found)
    check_ray_arguments(config, target, found)
    check_expert_placement(config, found)
    # Arithmetic with sizes out of bounds would only add misleading errors, or divide by zero.
    sizes_valid = not any(type(value) is int for name, _, value in walk(config) if name in invalid)
    if sizes_valid:
        check_sequence_parallel(config, found)
        check_tensor_parallel(config, found)
        check_actor(config, found)
        check_rollout(config, target, found)
        check_carried_prompts(config, found)
        check_async_training(config, found)
        check_algorithm(config, found)
        check_critic(config, found)
        check_critic_warmup(config, found)
        check_python_of_workers(config, found)
        check_fsdp(config, found)
        model = check_model(config, target, found)
        critic = check_critic_model(config, model, target, found)
        served = (
            []
            if model is None
            else [*check_distillation(config, target, found), *check_reward_model(config, target, found)]
        )
    before_lora = len(found.errors)
    if model is not None and not invalid:
        check_lora(config, model, found)
    lora_valid = len(found.errors) == before_lora
    data = check_data(config, found)
    prompt_lengths = None if target.starting else check_rows(config, found)
    check_reward(config, found)
    check_agent(config, found)
    check_rollout_correction(config, found)
    check_sampling_mask(config, found)
    check_skip(config, found)
    check_quantization_guard(config, found)
    check_old_log_probs(config, found)
    if target.hardware is None:
        check_loggers(config, found)
        check_directories(config, found)
        check_contents(config, found)
        check_resume(config, data, found, model, critic)
    device = None if "trainer.device" in invalid else check_device(config, target, found)
    if device is not None and model is not None:
        check_latent_attention("actor_rollout_ref.model.path", model, device, found)
    if device is not None:
        _check_on_device(config, device, target, invalid, sizes_valid, found)
    before_quantization = len(found.errors)
    if device is not None and model is not None and not invalid:
        quantization = _check_quantization(config, device, model, target, found)
    if not invalid:
        check_qat(config, device, quantization, found)
    valid = not invalid and lora_valid and len(found.errors) == before_quantization
    return _Inputs(device, model, critic, served, data, prompt_lengths, quantization, valid)


def _check_on_device(
    config: PPOConfig, device: str, target: Target, invalid: set[str], sizes_valid: bool, found: Findings
) -> None:
    """Run the checks that need only the device."""
    if not any(name.startswith("global_profiler.") or ".profiler." in name for name in invalid):
        check_profiler(config, device, target, found)
    if not target.starting:
        check_environment(config, device, target.environment, found)
    if sizes_valid and "actor_rollout_ref.rollout.checkpoint_engine.backend" not in invalid:
        check_transport(config, device, found)
    if sizes_valid:
        check_rollout_lag(config, device, found)


def _check_quantization(
    config: PPOConfig, device: str, model: ModelFiles, target: Target, found: Findings
) -> WeightFormat | None:
    if target.starting:
        return check_quantization(config, device, found)
    return check_planned_quantization(config, device, model, found)


def _device_memory(
    config: PPOConfig, hardware: Hardware, plan: Plan, model: ModelFiles, inputs: _Inputs
) -> DeviceMemory | None:
    """Return the estimate for a device of other hardware; None for a CPU or a model of unknown size."""
    if hardware.memory_bytes is None or model.parameters is None:
        return None
    itemsize = itemsize_of(plan.rollout_dtype)
    quantized = None if inputs.quantization is None else inputs.quantization.engine_bytes(itemsize)
    return device_memory(
        config,
        model,
        device=plan.device,
        capacity=hardware.memory_bytes,
        ranks=plan.trainer_ranks,
        engine_weights=quantized or model.parameters * itemsize,
        critic=inputs.critic,
    )


def _other_memory(
    device: str, hardware: Hardware, plan: Plan, model: ModelFiles, inputs: _Inputs, config: PPOConfig
) -> tuple[DeviceMemory | None, int]:
    """Return the estimate of a config that differs from the plan's in its use of memory; see `Estimate`."""
    host = estimate_memory(config, model, inputs.critic, inputs.served, device)
    return _device_memory(config, hardware, plan, model, inputs), 0 if host is None else host.offloaded_bytes
