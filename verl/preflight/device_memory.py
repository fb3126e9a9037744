"""Estimates of an accelerator's memory in each stage of a step: the predictable parts, and reserves for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.lora import adapter_parameters, lora_options
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic
from verl.preflight.estimate import (
    activation_bytes,
    critic_activation_bytes,
    critic_state_bytes,
    gathered_bytes,
    ref_state_bytes,
    trainer_state_bytes,
)
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
# Names of parts that the checks look for.
ACTIVATIONS = "activations and logits"
GENERATION = "generation"


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
    update = {"state of the trainer": trainer.resident, "largest weight": trainer.largest, "runtime": _RUNTIME}
    if shared:
        generation |= {"state of the trainer": trainer.resident, "runtime": _RUNTIME}
        update |= {"engine": awake}
    stages = [Stage(GENERATION, generation)]
    for name, parts in trainer.updates.items():
        stages.append(Stage(name, parts | ({"engine": asleep} if shared else {})))
    stages.append(Stage("weight update", update))
    token = kv_bytes_per_token(model, _COMPUTE_ITEMSIZE, rollout.tensor_model_parallel_size)
    tokens = max(0, cache) // max(1, token)
    return DeviceMemory(capacity, tuple(stages), weights, cache, tokens, trainer.resident, shared)


class _Trainer:
    """Memory of actor, reference model and critic on one device.

    Attributes:
        resident: weights and optimizer state, which stay on the device.
        updates: stage name -> parts.
        largest: copies of the largest weight in a weight update.
    """

    def __init__(
        self, config: PPOConfig, model: ModelFiles, device: str, ranks: int, critic: ModelFiles | None
    ) -> None:
        assert model.parameters is not None
        lora = lora_options(config.actor_rollout_ref.model)
        adapters = None if lora is None else adapter_parameters(lora, model.shapes)
        state = trainer_state_bytes(config, model.parameters, ranks, adapters)
        if config.actor_rollout_ref.ref.fsdp_config.param_offload:
            state -= ref_state_bytes(config, model.parameters, ranks)
        master = itemsize_of(config.actor_rollout_ref.actor.fsdp_config.model_dtype)
        gradients = (model.parameters if adapters is None else adapters) * master // ranks
        critic_state = 0
        if critic is not None and critic.parameters is not None and needs_critic(config):
            critic_state = critic_state_bytes(config, critic.parameters, ranks)
        # A quarter of the critic's state is gradients, which exist only in its update.
        self.resident = state - gradients + critic_state * 3 // 4
        embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
        # The weight in float32 and its copy in the engine's dtype.
        self.largest = embedding * (itemsize_of("float32") + _COMPUTE_ITEMSIZE)
        activations = activation_bytes(config, model, _COMPUTE_ITEMSIZE, ranks)
        self.updates: dict[str, dict[str, int]] = {}
        if critic_state and critic is not None:
            self.updates["critic update"] = self._update(
                critic_state // 4, critic, critic_activation_bytes(config, critic, device, ranks)
            )
        self.updates["actor update"] = self._update(gradients, model, activations)

    def _update(self, gradients: int, model: ModelFiles, activations: int) -> dict[str, int]:
        return {
            "state of the trainer": self.resident,
            "gradients": gradients,
            "gathered weights": gathered_bytes(model, _COMPUTE_ITEMSIZE),
            ACTIVATIONS: activations,
            "runtime": _RUNTIME,
        }
