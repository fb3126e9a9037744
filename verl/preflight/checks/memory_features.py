"""The cheapest keys with which a stage fits into a device's memory: sharding, and offloading to the host."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from verl.config.actor import FSDPConfig
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.config.schema import show
from verl.preflight.device_memory import GENERATION, WEIGHT_UPDATE, DeviceMemory
from verl.preflight.placement import trainer_ranks, weight_shards
from verl.utils.byte_size import format_gb

Estimate = Callable[[PPOConfig], tuple[DeviceMemory | None, int]]
"""Returns the estimate for a device, and the bytes that are offloaded to the host for each of its ranks."""


def cheapest_features(config: PPOConfig, stage: str, limit: float, estimate: Estimate) -> str | None:
    """Return the change with which a stage needs at most `limit` bytes, and its numbers; None if there is none.

    The changes are ordered by the time that they cost: defaults of other keys, state that moves to the host
    once in a step, inputs of layers, which move in each pass, and weights that are copied for each layer beside an
    optimizer that runs on the CPU.
    """
    for keys in _changes(config, stage):
        changed = copy.deepcopy(config)
        for name, value in keys.items():
            owner, _, last = name.rpartition(".")
            setattr(functools.reduce(getattr, owner.split("."), changed), last, value)
        memory, offloaded = estimate(changed)
        if memory is None:
            return None
        needed = next(each.total for each in memory.stages if each.name == stage)
        if needed <= limit:
            per_node = config.trainer.n_gpus_per_node
            host = f", and {format_gb(offloaded * per_node)} of host memory for the {per_node} ranks of a node"
            shown = " and ".join(f"{name}={show(value)}" for name, value in keys.items())
            return f"set {shown}: then about {format_gb(needed)} of the device{host if offloaded else ''}"
    return None


def _changes(config: PPOConfig, stage: str) -> Iterator[dict[str, Any]]:
    """Iterate over values of keys, the cheapest first."""
    ref, *trained = _roles(config)
    moments = {f"{name}.optimizer_offload": True for name, section in trained if not section.optimizer_offload}
    weights = {f"{name}.param_offload": True for name, section in trained if not section.param_offload}
    references = {}
    if needs_ref(config) and not (ref[1].param_offload or ref[1].offload_policy):
        references = {f"{ref[0]}.param_offload": True}
    state = references | moments | weights
    policies = references | {f"{name}.offload_policy": True for name, _ in trained}
    defaults = _defaults(config)
    inputs = {} if stage in (GENERATION, WEIGHT_UPDATE) else _layer_inputs(config, stage)
    tried: list[dict[str, Any]] = [{}]
    for keys in (
        defaults,
        references,
        moments,
        references | moments,
        state,
        inputs,
        defaults | inputs,
        state | inputs,
        policies,
        defaults | policies | inputs,
    ):
        if keys not in tried:
            tried.append(keys)
            yield keys


def _roles(config: PPOConfig) -> list[tuple[str, FSDPConfig]]:
    """Return name and section of the reference model, and of each trained model without `offload_policy`."""
    roles = config.actor_rollout_ref
    trained: list[tuple[str, FSDPConfig]] = [("actor_rollout_ref.actor.fsdp_config", roles.actor.fsdp_config)]
    if needs_critic(config):
        trained.append(("critic.fsdp", config.critic.fsdp))
    ref: tuple[str, FSDPConfig] = ("actor_rollout_ref.ref.fsdp_config", roles.ref.fsdp_config)
    return [ref, *((name, section) for name, section in trained if not section.offload_policy)]


def _defaults(config: PPOConfig) -> dict[str, Any]:
    """Return the defaults of keys that hold more on the device than with their defaults."""
    ref, *trained = _roles(config)
    changed: dict[str, Any] = {}
    if config.actor_rollout_ref.model.use_fused_kernels is False:
        changed["actor_rollout_ref.model.use_fused_kernels"] = None
    for name, section in [*trained, *([ref] if needs_ref(config) else [])]:
        if weight_shards(config, section) < trainer_ranks(config):
            changed[f"{name}.fsdp_size"] = -1
        if not section.reshard_after_forward:
            changed[f"{name}.reshard_after_forward"] = True
        if section.forward_prefetch:
            changed[f"{name}.forward_prefetch"] = False
    return changed


def _layer_inputs(config: PPOConfig, stage: str) -> dict[str, Any]:
    is_critic = stage.startswith("critic")
    model = config.critic.model if is_critic else config.actor_rollout_ref.model
    if not model.enable_gradient_checkpointing or model.enable_activation_offload:
        return {}
    return {f"{'critic.model' if is_critic else 'actor_rollout_ref.model'}.enable_activation_offload": True}
