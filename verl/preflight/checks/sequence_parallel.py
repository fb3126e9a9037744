"""Checks of `ulysses_sequence_parallel_size`: ranks, padding, and models whose sequences ranks can share."""

from __future__ import annotations

from typing import NamedTuple

from verl.config.actor import FSDPConfig
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, needs_ref
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel, ref_sequence_parallel
from verl.preflight.attention_parts import uses_eager_attention
from verl.preflight.findings import Findings
from verl.preflight.placement import trainer_ranks
from verl.utils.hf_config import ATTENTION_BACKEND
from verl.utils.model_dir.model_files import ModelFiles

_KEY = "ulysses_sequence_parallel_size"
_ACTOR, _REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
_POLICY, _CRITIC = "actor_rollout_ref.model", "critic.model"
# Layers that mix tokens by softmax attention, by their names in `layer_types`.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
# Types of models with other layers, which their config.json need not list.
_OTHER_LAYERS = frozenset(
    (
        *("bamba", "deepseek_v4", "falcon_h1", "falcon_mamba", "glm5_next", "granitemoehybrid", "jamba"),
        *("kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5"),
        *("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "recurrent_gemma", "rwkv"),
        *("xlstm", "zamba", "zamba2", "zaya"),
    )
)


class _Role(NamedTuple):
    """A model whose sequences ranks share.

    Attributes:
        key: the key that gives the number of ranks.
        size: this number.
        model: section of the model.
        packs: `use_remove_padding` of this section.
    """

    key: str
    size: int
    model: str
    packs: bool


def check_sequence_parallel(config: PPOConfig, found: Findings) -> None:
    """Check that the sizes divide the ranks, are given once, and come with packed rows."""
    _check_equal_values(config, found)
    trainer, ranks = config.trainer, trainer_ranks(config)
    for role in _roles(config):
        field = f"{role.key}={role.size}"
        if ranks % role.size:
            sizes = ", ".join(str(size) for size in range(1, ranks + 1) if ranks % size == 0)
            found.add_size_error(
                f"{field}: must divide the {ranks} ranks of the trainer (trainer.n_gpus_per_node="
                f"{trainer.n_gpus_per_node} x trainer.nnodes={trainer.nnodes}); use one of {sizes}"
            )
        elif trainer.n_gpus_per_node % role.size:
            found.warnings.append(
                f"{field}: with trainer.n_gpus_per_node={trainer.n_gpus_per_node}, ranks of different nodes share "
                "sequences and exchange them in each layer, which the network between nodes slows down"
            )
        if not role.packs:
            found.errors.append(
                f"{role.model}.use_remove_padding=False: with {field} ranks share packed rows; use True, or "
                f"{role.key}=1"
            )


def check_shared_sequences(config: PPOConfig, section: str, files: ModelFiles, found: Findings) -> None:
    """Check that ranks can share the sequences of a model.

    Args:
        section: `actor_rollout_ref.model` or `critic.model`.
        files: the model with `override_config`.
    """
    for role in _roles(config):
        if role.model != section:
            continue
        field, heads = f"{role.key}={role.size}", files.heads
        if heads is not None and heads % role.size:
            sizes = ", ".join(str(size) for size in range(1, heads + 1) if heads % size == 0)
            found.errors.append(
                f"{field}: must divide the {heads} query heads of {files.path}, because each rank computes the "
                f"attention of some of them; use one of {sizes}"
            )
        reason = _needs_whole_sequences(files)
        if reason is not None:
            found.errors.append(f"{field}: not supported for {files.path}: {reason}; use {role.key}=1")


def _needs_whole_sequences(files: ModelFiles) -> str | None:
    """Return the reason why each rank needs whole sequences of this model; None if it does not."""
    config = files.config
    kind, backend = str(config.get("model_type")), config.get(ATTENTION_BACKEND)
    listed = config.get("layer_types")
    others = sorted(set(listed) - _ATTENTION_LAYERS) if isinstance(listed, list) else []
    if others or kind in _OTHER_LAYERS:
        layers = f" (layer_types: {', '.join(map(str, others))})" if others else ""
        return f"{kind} has layers other than softmax attention{layers}, which need whole sequences"
    if backend not in (None, "sdpa"):
        return f"attn_implementation={backend} computes whole rows; leave it out of override_config, or"
    if uses_eager_attention(config):
        return (
            f"{kind} has a part of attention that torch's scaled_dot_product_attention does not compute (soft caps, "
            "sinks or ALiBi)"
        )
    return None


def _check_equal_values(config: PPOConfig, found: Findings) -> None:
    """Check that a role's section and its `fsdp_config` do not name two sizes."""
    roles = config.actor_rollout_ref
    sections: list[tuple[str, str, int, FSDPConfig]]
    sections = [(_ACTOR, "fsdp_config", roles.actor.ulysses_sequence_parallel_size, roles.actor.fsdp_config)]
    if needs_ref(config):
        sections.append((_REF, "fsdp_config", roles.ref.ulysses_sequence_parallel_size or 1, roles.ref.fsdp_config))
    if needs_critic(config):
        sections.append(("critic", "fsdp", config.critic.ulysses_sequence_parallel_size, config.critic.fsdp))
    for section, name, size, fsdp in sections:
        other = fsdp.ulysses_sequence_parallel_size
        if size > 1 and other > 1 and size != other:
            found.add_size_error(
                f"{section}.{_KEY}={size}: differs from {section}.{name}.{_KEY}={other}, which means the same; leave "
                "one of the two out"
            )


def _roles(config: PPOConfig) -> list[_Role]:
    """Return the roles of this run whose sequences ranks share; the reference model only if it differs."""
    roles, critic = config.actor_rollout_ref, config.critic
    actor = actor_sequence_parallel(roles.actor)
    found = [_Role(_source(_ACTOR, "fsdp_config", roles.actor), actor, _POLICY, roles.model.use_remove_padding)]
    ref = ref_sequence_parallel(roles.ref, roles.actor)
    if needs_ref(config) and ref != actor:
        found.append(_Role(_source(_REF, "fsdp_config", roles.ref), ref, _POLICY, roles.model.use_remove_padding))
    if needs_critic(config):
        size = critic_sequence_parallel(critic)
        found.append(_Role(_source("critic", "fsdp", critic), size, _CRITIC, critic.model.use_remove_padding))
    return [role for role in found if role.size > 1]


def _source(section: str, fsdp: str, config: object) -> str:
    """Return the key of a section that gives the size."""
    size = getattr(config, _KEY)
    return f"{section}.{_KEY}" if size is not None and size > 1 else f"{section}.{fsdp}.{_KEY}"
