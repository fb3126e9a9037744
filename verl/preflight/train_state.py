"""State of the trainer's models on one rank: weights, gradients, moments of AdamW, encoded rows; where it is held."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.actor import FSDPConfig
from verl.config.lora import adapter_parameters, lora_options
from verl.config.ppo import PPOConfig
from verl.config.qat import qat_mode
from verl.config.roles import needs_critic, needs_ref
from verl.preflight.placement import trainer_ranks, weight_shards
from verl.utils.dtypes import itemsize_of
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import weight_format_class


@dataclass(frozen=True)
class ModelState:
    """One rank's share of a model's state, in bytes.

    Attributes:
        weights: master weights.
        gradients: gradients, which exist only in an update.
        moments: AdamW's two moments.
        encoded: encoded rows of quantization-aware training, at most; see `verl.workers.engine.qat`.
    """

    weights: int = 0
    gradients: int = 0
    moments: int = 0
    encoded: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.encoded


@dataclass(frozen=True)
class PlacedState:
    """One rank's share of a model's state by its place, in bytes, on hardware whose devices have their own memory.

    Attributes:
        resident: on the device all the time.
        in_update: on the device in the update of this model, in addition.
        in_export: on the device in a weight update, in addition.
        host: in host memory, which stays allocated.
    """

    resident: int
    in_update: int
    in_export: int
    host: int


def place(state: ModelState, section: FSDPConfig) -> PlacedState:
    """Return where a model's state is held with the keys of its section."""
    if section.offload_policy:
        return PlacedState(state.encoded, 0, 0, state.weights + state.gradients + state.moments)
    weights = state.weights if section.param_offload else 0
    moments = state.moments if section.optimizer_offload else 0
    resident = state.weights + state.moments + state.encoded - weights - moments
    return PlacedState(resident, state.gradients + weights + moments, weights, weights + moments)


def placed_states(config: PPOConfig, model: ModelFiles, critic: ModelFiles | None) -> dict[str, PlacedState]:
    """Return the state of the `actor`, the `ref` model and the `critic`; without a critic or a reference it is 0."""
    roles = config.actor_rollout_ref
    return {
        "actor": place(actor_state(config, model), roles.actor.fsdp_config),
        "ref": place(ref_state(config, model), roles.ref.fsdp_config),
        "critic": place(critic_state(config, critic), config.critic.fsdp),
    }


def actor_state(config: PPOConfig, model: ModelFiles) -> ModelState:
    """Return the policy's state. With LoRA only the adapters, which are float32, have gradients and moments."""
    roles, parameters = config.actor_rollout_ref, model.parameters or 0
    shards = weight_shards(config, roles.actor.fsdp_config)
    master, encoded = itemsize_of(roles.actor.fsdp_config.model_dtype), 0
    if qat_mode(roles.actor.fsdp_config, roles.rollout) is not None:
        encoded = _encoded_bytes(config, parameters) // shards
        if trainer_ranks(config) > 1 and not roles.model.enable_gradient_checkpointing:
            encoded += _encoded_bytes(config, parameters)  # gathered for the forward pass, kept for the backward pass
    lora = lora_options(roles.model)
    if lora is None:
        held = parameters * master // shards
        return ModelState(held, held, 2 * held, encoded)
    adapters = adapter_parameters(lora, model.shapes) * itemsize_of("float32")
    return ModelState((parameters * master + adapters) // shards, adapters // shards, 2 * adapters // shards, encoded)


def ref_state(config: PPOConfig, model: ModelFiles) -> ModelState:
    """Return the state of the reference model; nothing without one."""
    if not needs_ref(config):
        return ModelState()
    roles = config.actor_rollout_ref
    parameters, encoded = model.parameters or 0, 0
    shards = weight_shards(config, roles.ref.fsdp_config)
    if qat_mode(roles.ref.fsdp_config, roles.rollout) is not None:
        encoded = _encoded_bytes(config, parameters) // shards
    return ModelState(weights=_weight_bytes(roles.ref.fsdp_config, parameters) // shards, encoded=encoded)


def critic_state(config: PPOConfig, critic: ModelFiles | None) -> ModelState:
    """Return the critic's state; nothing without a critic or a known size."""
    if critic is None or critic.parameters is None or not needs_critic(config):
        return ModelState()
    held = _weight_bytes(config.critic.fsdp, critic.parameters) // weight_shards(config, config.critic.fsdp)
    return ModelState(held, held, 2 * held)


def _weight_bytes(section: FSDPConfig, parameters: int) -> int:
    return parameters * itemsize_of(section.model_dtype)


def _encoded_bytes(config: PPOConfig, parameters: int) -> int:
    return weight_format_class(config.actor_rollout_ref.rollout.quantization).estimated_bytes(parameters, 0)
