"""`check`: a config against the model, the data and the machine, before any process starts."""

from __future__ import annotations

from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.schema import walk
from verl.config.values import value_problems
from verl.preflight.checks.agent import check_agent
from verl.preflight.checks.algorithm import check_algorithm
from verl.preflight.checks.batches import check_batches, check_replicas
from verl.preflight.checks.critic import check_critic, check_critic_model
from verl.preflight.checks.data import check_data
from verl.preflight.checks.device_memory import check_device_memory
from verl.preflight.checks.lag import check_lag
from verl.preflight.checks.lora import check_lora
from verl.preflight.checks.machine import (
    check_device,
    check_directories,
    check_environment,
    check_loggers,
    check_memory,
    check_ports,
)
from verl.preflight.checks.model import check_model
from verl.preflight.checks.partial_rollout import check_partial_rollout
from verl.preflight.checks.policy_loss import check_policy_loss
from verl.preflight.checks.quantization import check_planned_quantization, check_quantization
from verl.preflight.checks.reward import check_reward
from verl.preflight.checks.rollout_correction import check_rollout_correction
from verl.preflight.checks.rows import check_rows
from verl.preflight.checks.transport import check_transport
from verl.preflight.checks.unused_keys import unused_key_notes
from verl.preflight.derive_plan import derive_plan
from verl.preflight.device_memory import DeviceMemory, device_memory
from verl.preflight.findings import Findings
from verl.preflight.plan import Plan
from verl.preflight.target import Hardware, Scope
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import WeightFormat

_ENGINE_KWARGS = ("vllm", "sglang", "trtllm")


def check(config: PPOConfig) -> Plan:
    """Check everything that can be checked without starting a process, and derive the plan of a run that starts here.

    Raises:
        ConfigError: lists every problem: field, value, what to do.
    """
    plan, found = examine(config, Scope())
    if plan is None or found.errors:
        raise ConfigError(found.errors)
    return plan


def examine(config: PPOConfig, scope: Scope) -> tuple[Plan | None, Findings]:
    """Everything that can be known of a config without starting a process.

    Returns:
        The plan, None where errors leave nothing to derive it from or a run would start; and what was found, the plan's
        warnings included.
    """
    wrong = value_problems(config)
    found = Findings(errors=list(wrong.values()), without_files=scope.without_files)
    _check_engine_kwargs(config, found)
    # Arithmetic on sizes that are out of bounds would only add noise, or divide by zero.
    sizes_hold = not any(type(value) is int for name, _, value in walk(config) if name in wrong)
    if sizes_hold:
        _check_sizes(config, scope, found)
    model = check_model(config, scope, found) if sizes_hold else None
    critic = check_critic_model(config, model, scope, found) if sizes_hold else None
    before = len(found.errors)
    if model is not None and not wrong:
        check_lora(config, model, found)
    derivable = not wrong and len(found.errors) == before
    data = check_data(config, found)
    lengths = None if scope.starting else check_rows(config, found)
    check_reward(config, found)
    check_agent(config, found)
    check_rollout_correction(config, found)
    if scope.hardware is None:
        check_loggers(config, found)
        check_directories(config, found)
    device = None if "trainer.device" in wrong else check_device(config, scope, found)
    if device and not scope.starting:
        check_environment(config, device, scope.environment, found)
    if device and sizes_hold and "actor_rollout_ref.rollout.checkpoint_engine.backend" not in wrong:
        check_transport(config, device, found)
    if device and sizes_hold:
        check_lag(config, device, found)
    quantization: WeightFormat | None = None
    before = len(found.errors)
    if device and model and not wrong:
        quantization = (
            check_quantization(config, device, found)
            if scope.starting
            else check_planned_quantization(config, device, model, found)
        )
    derivable = derivable and len(found.errors) == before
    if device is None or model is None or not derivable or (scope.starting and found.errors):
        return None, found
    plan = derive_plan(config, device, model, critic, data, quantization)
    plan.prompt_lengths = lengths
    if scope.hardware is not None:
        plan.hardware, plan.available_bytes = scope.hardware.name, None
        plan.device_memory = _device_memory(config, scope.hardware, plan, model, critic, quantization)
        if plan.device_memory is not None:
            check_device_memory(config, plan.device_memory, found)
    check_memory(plan.memory, plan.available_bytes, found)
    plan.warnings, plan.notes = found.warnings, found.notes + unused_key_notes(config, device)
    return plan, found


def _check_sizes(config: PPOConfig, scope: Scope, found: Findings) -> None:
    check_batches(config, found)
    check_replicas(config, found)
    check_algorithm(config, found)
    check_critic(config, found)
    check_policy_loss(config, found)
    check_partial_rollout(config, found)
    if scope.hardware is None:
        check_ports(config, found)


def _device_memory(
    config: PPOConfig,
    hardware: Hardware,
    plan: Plan,
    model: ModelFiles,
    critic: ModelFiles | None,
    quantization: WeightFormat | None,
) -> DeviceMemory | None:
    if hardware.memory_bytes is None or model.parameters is None:
        return None
    itemsize = 4 if plan.rollout_dtype == "float32" else 2
    held = None if quantization is None else quantization.engine_bytes(itemsize)
    return device_memory(
        config,
        model,
        device=plan.device,
        capacity=hardware.memory_bytes,
        ranks=plan.trainer_ranks,
        engine_weights=held or model.parameters * itemsize,
        critic=critic,
    )


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
