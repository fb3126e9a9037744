"""Checks of how the trainer's ranks hold a model: `actor.fsdp_config`, `ref.fsdp_config` and `critic.fsdp`."""

from __future__ import annotations

from verl.config.actor import FSDPConfig
from verl.config.critic import CriticModelConfig
from verl.config.model import ModelConfig
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.preflight.findings import Findings
from verl.preflight.placement import trainer_ranks
from verl.utils.dtypes import DTYPE_NAMES


def check_fsdp(config: PPOConfig, found: Findings) -> None:
    """Check the sharding of every model that the run trains or holds."""
    for name, section in fsdp_sections(config).items():
        _check_size(name, section, config, found)
        _check_dtype(name, section, found)
    models: dict[str, ModelConfig | CriticModelConfig] = {"actor_rollout_ref.model": config.actor_rollout_ref.model}
    if needs_critic(config):
        models["critic.model"] = config.critic.model
    for name, model in models.items():
        if model.enable_activation_offload and not model.enable_gradient_checkpointing:
            found.errors.append(
                f"{name}.enable_activation_offload=True: moves the inputs of checkpointed layers to the host; set "
                f"{name}.enable_gradient_checkpointing=True too, or use False"
            )


def fsdp_sections(config: PPOConfig) -> dict[str, FSDPConfig]:
    """Return the section of each model of the trainer, by its dotted name."""
    roles = config.actor_rollout_ref
    sections: dict[str, FSDPConfig] = {"actor_rollout_ref.actor.fsdp_config": roles.actor.fsdp_config}
    if needs_ref(config):
        sections["actor_rollout_ref.ref.fsdp_config"] = roles.ref.fsdp_config
    if needs_critic(config):
        sections["critic.fsdp"] = config.critic.fsdp
    return sections


def _check_dtype(name: str, section: FSDPConfig, found: Findings) -> None:
    first, second = section.mixed_precision.param_dtype, section.dtype
    if first is not None and second != "auto" and DTYPE_NAMES[first] != DTYPE_NAMES[second]:
        found.errors.append(
            f"{name}.mixed_precision.param_dtype={first}: differs from {name}.dtype={second}, and both set the dtype "
            "of the computation; leave one of them out"
        )


def _check_size(name: str, section: FSDPConfig, config: PPOConfig, found: Findings) -> None:
    size, ranks = section.fsdp_size, trainer_ranks(config)
    if size == 0 or (0 < size < ranks and ranks % size):
        divisors = [divisor for divisor in range(1, ranks + 1) if ranks % divisor == 0]
        trainer = config.trainer
        found.errors.append(
            f"{name}.fsdp_size={size}: must divide the {ranks} ranks of the trainer (trainer.n_gpus_per_node="
            f"{trainer.n_gpus_per_node} x trainer.nnodes={trainer.nnodes}); use -1 for one copy of the weights over "
            f"all ranks, or one of {', '.join(map(str, divisors))}"
        )
