"""Estimates of a run's memory: the large, predictable parts, plus measured sizes of processes without a model."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.actor import ActorConfig
from verl.config.critic import CriticConfig
from verl.config.lora import adapter_parameters, lora_options
from verl.config.ppo import PPOConfig
from verl.config.qat import qat_mode
from verl.config.roles import needs_ref, resolve_critic
from verl.config.weight_updates import full_update_reason
from verl.preflight.attention_parts import soft_cap, uses_eager_attention
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.placement import replica_count, replica_nodes, trainer_ranks
from verl.utils.byte_size import MIB, format_bytes
from verl.utils.dtypes import choose_dtype, itemsize_of
from verl.utils.model_dir.kv_cache import cpu_kv_cache_bytes
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import weight_format_class

# Resident memory of processes without a model, measured.
_TRAINER_BASE = 600 * MIB
_REPLICA_BASE = 1100 * MIB
_DRIVER_BASE = 1200 * MIB  # includes Ray's own processes
_REWARD_WORKER = 60 * MIB
_LOGITS_CHUNK = 2 * 64 * MIB


@dataclass(frozen=True)
class MemoryEstimate:
    """Host memory in bytes, by process.

    Attributes:
        trainer_bytes: one trainer rank.
        replica_bytes: one replica, including its KV cache.
        cache_bytes: the KV cache of one replica.
        other_bytes: driver, Ray, reward workers and the buckets of a weight update.
        ranks, replicas: maximum number on the driver's node.
        total_bytes: all processes on the driver's node.
    """

    trainer_bytes: int
    replica_bytes: int
    cache_bytes: int
    other_bytes: int
    ranks: int
    replicas: int
    total_bytes: int

    def parts(self) -> list[tuple[str, str]]:
        """Return label and size of each part."""
        parts = [("trainer rank", f"{format_bytes(self.trainer_bytes)} x {self.ranks}")]
        if self.replicas:
            parts.append(("replica", f"{format_bytes(self.replica_bytes)} x {self.replicas}"))
        return [*parts, ("other processes", format_bytes(self.other_bytes))]


def estimate_memory(
    config: PPOConfig, model: ModelFiles, critic: ModelFiles | None, device: str
) -> MemoryEstimate | None:
    """Return the host memory that the run needs; None if the files do not give the model's size.

    On an accelerator, models use the device's memory, so the processes themselves count, and buffers of updates.

    Args:
        critic: the critic's files; None without a critic.
        device: `cpu`, `cuda` or `npu`.
    """
    if model.parameters is None:
        return None
    rollout, ranks = config.actor_rollout_ref.rollout, trainer_ranks(config)
    itemsize = itemsize_of(choose_dtype(device, rollout.dtype).name)
    engine_bytes = model.parameters * itemsize
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * MIB
    buckets = rollout.checkpoint_engine.buckets_in_flight * min(bucket, engine_bytes)
    other = buckets + _DRIVER_BASE + config.reward.workers * _REWARD_WORKER
    trainer, replica, cache = _TRAINER_BASE, _REPLICA_BASE, 0
    scheme = weight_format_class(rollout.quantization)
    if device == "cpu":
        trainer += _cpu_trainer_bytes(config, model, model.parameters, critic)
        cache = cpu_kv_cache_bytes(model, itemsize, config.max_model_len, rollout.max_num_seqs)
        held = scheme.estimated_bytes(model.parameters, itemsize, rollout.quantization_scheme)
        # A full update holds the weights in checkpoint layout and in kernel layout at the same time. On a CPU there is
        # also a packed or dequantized copy, which the kernels read.
        replica += engine_bytes + 2 * held + cache
        if full_update_reason(rollout, device) is None:
            # Deltas need the last sent weights.
            trainer += (held if scheme.trainer_encodes else engine_bytes) // ranks
    else:
        replica += scheme.host_bytes(model.parameters, rollout.quantization_scheme)
    nodes = config.trainer.nnodes
    local_ranks = ranks // nodes
    local_replicas = 0 if replica_nodes(config, device) else replica_count(config) // nodes
    total = trainer * local_ranks + replica * local_replicas + other
    return MemoryEstimate(trainer, replica, cache, other, local_ranks, local_replicas, total)


def _cpu_trainer_bytes(config: PPOConfig, model: ModelFiles, parameters: int, critic: ModelFiles | None) -> int:
    """Return the memory of all models of one trainer rank on a CPU."""
    ranks = trainer_ranks(config)
    lora = lora_options(config.actor_rollout_ref.model)
    adapters = None if lora is None else adapter_parameters(lora, model.shapes)
    state = trainer_state_bytes(config, parameters, ranks, adapters)
    itemsize = itemsize_of(choose_dtype("cpu", config.actor_rollout_ref.actor.fsdp_config.dtype).name)
    activations = activation_bytes(config, model, itemsize, ranks)
    if critic is not None and critic.parameters is not None:
        state += critic_state_bytes(config, critic.parameters, ranks)
        # Actor and critic compute one after the other.
        activations = max(activations, critic_activation_bytes(config, critic, "cpu", ranks))
    return state + gathered_bytes(model, itemsize) + activations


def trainer_state_bytes(config: PPOConfig, parameters: int, ranks: int, adapters: int | None = None) -> int:
    """Return one rank's shard of master weights, gradients, AdamW's two moments and the reference model's weights.

    With quantization-aware training also its encoded rows.

    Args:
        adapters: number of parameters of LoRA adapters, which are float32. The model itself then has neither gradients
            nor moments. None without LoRA.
    """
    master = itemsize_of(config.actor_rollout_ref.actor.fsdp_config.model_dtype)
    trained = parameters * (4 if adapters is None else 1) * master + (adapters or 0) * 4 * itemsize_of("float32")
    return trained // ranks + ref_state_bytes(config, parameters, ranks) + _qat_bytes(config, parameters, ranks)


def _qat_bytes(config: PPOConfig, parameters: int, ranks: int) -> int:
    """Return the bytes of encoded weights that one rank keeps, at most; see `verl.workers.engine.qat`."""
    roles = config.actor_rollout_ref
    encoded = weight_format_class(roles.rollout.quantization).estimated_bytes(parameters, 0)
    total = 0
    if qat_mode(roles.actor.fsdp_config, roles.rollout) is not None:
        total += encoded // ranks
        if ranks > 1 and not roles.model.enable_gradient_checkpointing:
            total += encoded  # gathered for the forward pass, and kept for the backward pass
    if needs_ref(config) and qat_mode(roles.ref.fsdp_config, roles.rollout) is not None:
        total += encoded // ranks
    return total


def gathered_bytes(model: ModelFiles, itemsize: int) -> int:
    """Return the size of gathered weights: two layers, gradients of one layer, embedding and head with gradients.

    FSDP2 gathers the current layer and the next one, and keeps embedding and head gathered.
    """
    embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
    layer = max(0, (model.parameters or 0) - 2 * embedding) // max(1, model.layers or 1)
    return itemsize * (3 * layer + 4 * embedding)


def ref_state_bytes(config: PPOConfig, parameters: int, ranks: int) -> int:
    """Return one rank's shard of the reference model's weights; 0 without a reference model."""
    if not needs_ref(config):
        return 0
    return parameters * itemsize_of(config.actor_rollout_ref.ref.fsdp_config.model_dtype) // ranks


def critic_state_bytes(config: PPOConfig, parameters: int, ranks: int) -> int:
    """Return one rank's shard of the critic's master weights, gradients and AdamW's two moments."""
    return parameters * 4 * itemsize_of(config.critic.fsdp.model_dtype) // ranks


def activation_bytes(config: PPOConfig, model: ModelFiles, itemsize: int, ranks: int) -> int:
    """Return the memory of one micro-batch: activations for the backward pass, response logits and their gradients."""
    data = config.data
    tokens = _micro_batch_tokens(config, config.actor_rollout_ref.actor, ranks)
    layers = _layer_activation_bytes(
        model, tokens, itemsize, config.actor_rollout_ref.model.enable_gradient_checkpointing, longest_sample(config)
    )
    responses = tokens * data.max_response_length // (data.max_prompt_length + data.max_response_length)
    logits = 2 * responses * (model.number("vocab_size") or 0) * itemsize
    return layers + logits + min(_LOGITS_CHUNK, 2 * logits)


def critic_activation_bytes(config: PPOConfig, model: ModelFiles, device: str, ranks: int) -> int:
    """Return the memory of one micro-batch of the critic, which has no logits."""
    critic = resolve_critic(config)
    tokens = _micro_batch_tokens(config, critic, ranks)
    size = itemsize_of(choose_dtype(device, critic.fsdp.dtype).name)
    checkpointing = critic.model.enable_gradient_checkpointing
    return _layer_activation_bytes(model, tokens, size, checkpointing, longest_sample(config))


def _micro_batch_tokens(config: PPOConfig, section: ActorConfig | CriticConfig, ranks: int) -> int:
    """Return the maximum tokens of a micro-batch of the actor or of the resolved critic."""
    assert section.ppo_mini_batch_size is not None
    longest = longest_sample(config)
    samples = max(1, section.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // ranks)
    if section.use_dynamic_bsz:
        return min(samples * longest, section.ppo_max_token_len_per_gpu)
    return min(samples, section.ppo_micro_batch_size_per_gpu or samples) * longest


def _layer_activation_bytes(model: ModelFiles, tokens: int, itemsize: int, checkpointing: bool, longest: int) -> int:
    """Return the size of the layers' activations; with gradient checkpointing the layers' inputs and one layer.

    Args:
        tokens: tokens of a micro-batch, in rows of at most `longest`.
    """
    hidden, layers = model.hidden or 0, model.layers or 0
    inner = model.number("intermediate_size") or 4 * hidden
    one_layer = tokens * (8 * hidden + 4 * inner) * itemsize
    one_layer += tokens * min(tokens, longest) * (model.heads or 0) * score_bytes(model, itemsize)
    return tokens * hidden * layers * itemsize + one_layer if checkpointing else one_layer * layers


def score_bytes(model: ModelFiles, itemsize: int) -> int:
    """Return the bytes that a layer keeps for its backward pass for each head and pair of query and key.

    Eager attention keeps the softmax in float32 and its copy in the compute dtype, and with soft caps also the tanh of
    the scores (`eager_attention_forward` in transformers). Other attention keeps nothing per pair.

    Args:
        itemsize: bytes of the compute dtype.
    """
    if not uses_eager_attention(model.config):
        return 0
    softmax = itemsize_of("float32")
    copy = 0 if itemsize == softmax else itemsize
    return softmax + copy + (itemsize if soft_cap(model.config) is not None else 0)
