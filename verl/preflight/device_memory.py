"""Estimates of an accelerator's memory in each stage of a step: the predictable parts, and reserves for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.ppo import PPOConfig
from verl.preflight.estimate import (
    activation_bytes,
    critic_activation_bytes,
    gathered_bytes,
)
from verl.preflight.train_state import PlacedState, actor_state, critic_state, placed_states
from verl.utils.byte_size import GIB
from verl.utils.dtypes import itemsize_of
from verl.utils.model_dir.kv_cache import kv_bytes_per_token
from verl.utils.model_dir.model_files import ModelFiles

# Reserve of a process on a device: context, buffers of collectives, fragmentation. Assumed.
_RUNTIME = 3 * GIB
# Reserve of an engine within gpu_memory_utilization: graphs and its largest forward pass. Assumed.
_ENGINE_RESERVE = 4 * GIB
# An engine in sleep mode.
_ASLEEP = 1 * GIB
# Accelerators compute in bfloat16.
_COMPUTE_ITEMSIZE = itemsize_of("bfloat16")
# Names of parts and stages that the checks look for.
ACTIVATIONS = "activations and logits"
LOADED = "loaded from the host"
GENERATION = "generation"
WEIGHT_UPDATE = "weight update"


@dataclass(frozen=True)
class Stage:
    """One stage of a step on one device.

    Attributes:
        name: such as `generation` or `actor update`.
        parts: bytes by use.
    """

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class DeviceMemory:
    """Memory of one device of the trainer; `generation` is about a device of a replica.

    Attributes:
        capacity: bytes of a device.
        stages: in the order of a step.
        weights_bytes: the engine's weights on one device.
        cache_bytes: the engine's KV cache on one device; negative if the weights exceed the engine's share.
        cache_tokens: tokens that the KV cache of a replica can hold.
        trainer_resident: the trainer's memory between its stages, on one device.
        shared: the replicas use the trainer's devices.
    """

    capacity: int
    stages: tuple[Stage, ...]
    weights_bytes: int
    cache_bytes: int
    cache_tokens: int
    trainer_resident: int
    shared: bool


def device_memory(
    config: PPOConfig,
    model: ModelFiles,
    *,
    device: str,
    capacity: int,
    ranks: int,
    engine_weights: int,
    critic: ModelFiles | None = None,
) -> DeviceMemory | None:
    """Return the estimate of every stage; None if the files do not give the model's size.

    Args:
        capacity: bytes of a device.
        ranks: ranks of the trainer.
        engine_weights: bytes of the weights of one replica.
        critic: the critic's files; None without a critic.
    """
    if model.parameters is None:
        return None
    rollout = config.actor_rollout_ref.rollout
    weights = engine_weights // rollout.tensor_model_parallel_size
    share = int(capacity * rollout.gpu_memory_utilization)
    cache = share - weights - _ENGINE_RESERVE
    trainer = _Trainer(config, model, device, ranks, critic)
    shared = rollout.nnodes == 0
    asleep = 0 if not shared else _ASLEEP if rollout.free_cache_engine else share
    awake = weights + _ASLEEP if rollout.free_cache_engine else share
    generation = {"weights": weights, "cache and graphs": share - weights}
    update = {"state of the trainer": trainer.resident, **trainer.exported, "runtime": _RUNTIME}
    if shared:
        generation |= {"state of the trainer": trainer.resident, "runtime": _RUNTIME}
        update |= {"engine": awake}
    stages = [Stage(GENERATION, generation)]
    for name, parts in trainer.updates.items():
        stages.append(Stage(name, parts | ({"engine": asleep} if shared else {})))
    stages.append(Stage(WEIGHT_UPDATE, update))
    token = kv_bytes_per_token(model, _COMPUTE_ITEMSIZE, rollout.tensor_model_parallel_size)
    tokens = max(0, cache) // max(1, token)
    return DeviceMemory(capacity, tuple(stages), weights, cache, tokens, trainer.resident, shared)


class _Trainer:
    """Memory of actor, reference model and critic on one device.

    Attributes:
        resident: weights and optimizer state that stay on the device.
        exported: weights that are on the device only in a weight update, and copies of the largest one.
        updates: stage name -> parts.
    """

    def __init__(
        self, config: PPOConfig, model: ModelFiles, device: str, ranks: int, critic: ModelFiles | None
    ) -> None:
        placed = placed_states(config, model, critic)
        self.resident = sum(each.resident for each in placed.values())
        embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
        # The weight in float32 and its copy in the engine's dtype.
        largest = embedding * (itemsize_of("float32") + _COMPUTE_ITEMSIZE)
        self.exported = {LOADED: placed["actor"].in_export, "largest weight": largest}
        activations = activation_bytes(config, model, _COMPUTE_ITEMSIZE, ranks)
        self.updates: dict[str, dict[str, int]] = {}
        if critic is not None and critic_state(config, critic).weights:
            held = critic_activation_bytes(config, critic, device, ranks)
            gradients = 0 if config.critic.fsdp.offload_policy else critic_state(config, critic).gradients
            self.updates["critic update"] = self._update(
                placed["critic"], gradients, gathered_bytes(critic, _COMPUTE_ITEMSIZE, config.critic.fsdp), held
            )
        section = config.actor_rollout_ref.actor.fsdp_config
        gradients = 0 if section.offload_policy else actor_state(config, model).gradients
        gathered = gathered_bytes(model, _COMPUTE_ITEMSIZE, section)
        self.updates["actor update"] = self._update(placed["actor"], gradients, gathered, activations)

    def _update(self, placed: PlacedState, gradients: int, gathered: int, activations: int) -> dict[str, int]:
        return {
            "state of the trainer": self.resident,
            LOADED: placed.in_update - gradients,
            "gradients": gradients,
            "gathered weights": gathered,
            ACTIVATIONS: activations,
            "runtime": _RUNTIME,
        }
