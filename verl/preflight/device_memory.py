"""How much memory of an accelerator each stage of a step takes: what can be predicted, and reserves for the rest."""

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
from verl.utils.dtypes import itemsize
from verl.utils.model_dir.kv_cache import kv_bytes_per_token
from verl.utils.model_dir.model_files import ModelFiles

_GIB = 1 << 30
# Of a process on a device: its context, the collectives' buffers, what the allocator cannot use.
_RUNTIME = 3 * _GIB
# Of an engine: graphs and the largest forward pass, inside gpu_memory_utilization.
_ENGINE_RESERVE = 4 * _GIB
_ASLEEP = 1 * _GIB
_ITEMSIZE = 2


@dataclass(frozen=True)
class Stage:
    """A part of a step on one device: bytes by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class DeviceMemory:
    """Of one device of the trainer, and of the replicas where they have devices of their own.

    Attributes:
        capacity: bytes of a device.
        stages: in the order of a step.
        weights_bytes: of the engine's weights on a device.
        cache_bytes: that the engine's share leaves for keys and values, on a device; negative where weights alone are
            more than the share.
        cache_tokens: that a replica can hold at a time.
        trainer_resident: that the trainer keeps between its stages, on a device.
        shared: the replicas are on the trainer's devices.
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
    """Estimate every stage; None where the model's size is not known.

    Args:
        capacity: bytes of a device.
        ranks: of the trainer.
        engine_weights: bytes of the weights of one replica.
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
    stages = [Stage("generation", generation)]
    for name, parts in trainer.updates.items():
        stages.append(Stage(name, parts | ({"engine": asleep} if shared else {})))
    stages.append(Stage("weight update", update))
    tokens = max(0, cache) // max(1, kv_bytes_per_token(model, _ITEMSIZE, rollout.tensor_model_parallel_size))
    return DeviceMemory(capacity, tuple(stages), weights, cache, tokens, trainer.resident, shared)


class _Trainer:
    """What actor, reference model and critic take of a device.

    Attributes:
        resident: kept all the time: weights, optimizer.
        updates: by stage, what it takes.
        largest: the largest weight for an update.
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
        master = itemsize(config.actor_rollout_ref.actor.fsdp_config.model_dtype)
        gradients = (model.parameters if adapters is None else adapters) * master // ranks
        critic_state = 0
        if critic is not None and critic.parameters is not None and needs_critic(config):
            critic_state = critic_state_bytes(config, critic.parameters, ranks)
        # A quarter of the critic's state are gradients, which live in its update alone.
        self.resident = state - gradients + critic_state * 3 // 4
        embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
        self.largest = embedding * (4 + _ITEMSIZE)
        activations = activation_bytes(config, model, _ITEMSIZE, ranks)
        self.updates = {}
        if critic_state and critic is not None:
            self.updates["critic update"] = self._update(
                critic_state // 4, critic, critic_activation_bytes(config, critic, device, ranks)
            )
        self.updates["actor update"] = self._update(gradients, model, activations)

    def _update(self, gradients: int, model: ModelFiles, activations: int) -> dict[str, int]:
        return {
            "state of the trainer": self.resident,
            "gradients": gradients,
            "gathered weights": gathered_bytes(model, _ITEMSIZE),
            "activations and logits": activations,
            "runtime": _RUNTIME,
        }
