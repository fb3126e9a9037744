"""Estimates of a run's memory: the large, predictable parts, plus measured sizes of processes without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.config.actor import ActorConfig, FSDPConfig
from verl.config.critic import CriticConfig, CriticModelConfig
from verl.config.engine_pools import EnginePool
from verl.config.model import ModelConfig
from verl.config.ppo import PPOConfig
from verl.config.qat import policy_dtype
from verl.config.roles import resolve_critic
from verl.config.sequence_parallel import actor_sequence_parallel, critic_sequence_parallel
from verl.config.weight_updates import full_update_reason
from verl.preflight.attention_parts import soft_cap, uses_eager_attention
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.placement import replica_count, replica_nodes, trainer_ranks
from verl.preflight.train_state import actor_state, critic_state, placed_states, ref_state
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
_TOKENIZER = 400 * MIB  # with the libraries that load it
_LOGITS_CHUNK = 2 * 64 * MIB
_LOGITS_TILES = 4 * 32 * MIB


# Engines with fixed weights, with the files of their models.
ServedModels = Sequence[tuple[EnginePool, ModelFiles]]


@dataclass(frozen=True)
class MemoryEstimate:
    """Host memory in bytes, by process.

    Attributes:
        trainer_bytes: one trainer rank.
        replica_bytes: one replica, including its KV cache.
        cache_bytes: the KV cache of one replica.
        offloaded_bytes: the part of `trainer_bytes` that is moved there from a device.
        other_bytes: driver, Ray, reward workers, engines of a teacher or a reward model, and the buckets of a weight
            update.
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
    offloaded_bytes: int = 0

    def parts(self) -> list[tuple[str, str]]:
        """Return label and size of each part."""
        moved = f", {format_bytes(self.offloaded_bytes)} of it offloaded" if self.offloaded_bytes else ""
        parts = [("trainer rank", f"{format_bytes(self.trainer_bytes)} x {self.ranks}{moved}")]
        if self.replicas:
            parts.append(("replica", f"{format_bytes(self.replica_bytes)} x {self.replicas}"))
        return [*parts, ("other processes", format_bytes(self.other_bytes))]


def estimate_memory(
    config: PPOConfig, model: ModelFiles, critic: ModelFiles | None, served: ServedModels, device: str
) -> MemoryEstimate | None:
    """Return the host memory that the run needs; None if the files do not give the model's size.

    On an accelerator, models use the device's memory, so the processes themselves count, buffers of updates, and
    what is offloaded.

    Args:
        critic: files of its model; None without one.
        served: the models that engines with fixed weights serve.
        device: `cpu`, `cuda` or `npu`.
    """
    if model.parameters is None:
        return None
    rollout, ranks = config.actor_rollout_ref.rollout, trainer_ranks(config)
    itemsize = itemsize_of(choose_dtype(device, rollout.dtype).name)
    engine_bytes = model.parameters * itemsize
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * MIB
    buckets = rollout.checkpoint_engine.buckets_in_flight * min(bucket, engine_bytes)
    worker = _REWARD_WORKER + (_TOKENIZER if config.reward.reward_model.enable else 0)
    other = buckets + _DRIVER_BASE + config.reward.workers * worker
    other += sum(_pool_bytes(pool, files, device) for pool, files in served)
    trainer, replica, cache, offloaded = _TRAINER_BASE, _REPLICA_BASE, 0, 0
    scheme = weight_format_class(rollout.quantization)
    if device == "cpu":
        trainer += _cpu_trainer_bytes(config, model, critic)
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
        offloaded = sum(placed.host for placed in placed_states(config, model, critic).values())
        computes = itemsize_of(policy_dtype(device, config.actor_rollout_ref.actor.fsdp_config, rollout).name)
        offloaded += offloaded_activation_bytes(config, model, critic, computes)
        trainer += offloaded
    nodes = config.trainer.nnodes
    local_ranks = ranks // nodes
    local_replicas = 0 if replica_nodes(config, device) else replica_count(config) // nodes
    total = trainer * local_ranks + replica * local_replicas + other
    return MemoryEstimate(trainer, replica, cache, other, local_ranks, local_replicas, total, offloaded)


def _pool_bytes(pool: EnginePool, files: ModelFiles, device: str) -> int:
    """Return the host memory of all engines of a pool, as if all of them were on the driver's node."""
    engine = _REPLICA_BASE
    if device == "cpu":
        itemsize = itemsize_of(choose_dtype(device, pool.dtype).name)
        engine += (files.parameters or 0) * itemsize
        engine += cpu_kv_cache_bytes(files, itemsize, pool.request_tokens, pool.engine.max_num_seqs)
    return engine * pool.engines


def _cpu_trainer_bytes(config: PPOConfig, model: ModelFiles, critic: ModelFiles | None) -> int:
    """Return the memory of all models of one trainer rank on a CPU."""
    ranks = trainer_ranks(config)
    state = sum(
        each.total for each in (actor_state(config, model), ref_state(config, model), critic_state(config, critic))
    )
    roles = config.actor_rollout_ref
    itemsize = itemsize_of(policy_dtype("cpu", roles.actor.fsdp_config, roles.rollout).name)
    activations = activation_bytes(config, model, itemsize, ranks)
    if critic is not None and critic.parameters is not None:
        # Actor and critic compute one after the other.
        activations = max(activations, critic_activation_bytes(config, critic, "cpu", ranks))
    return state + gathered_bytes(model, itemsize, roles.actor.fsdp_config) + activations


def gathered_bytes(model: ModelFiles, itemsize: int, section: FSDPConfig) -> int:
    """Return the size of gathered weights: two layers, gradients of one layer, embedding and head with gradients.

    FSDP2 gathers the current layer and the next one, and keeps embedding and head gathered. `forward_prefetch` gathers
    one more layer, and without `reshard_after_forward` all layers stay.
    """
    embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
    all_layers = max(0, (model.parameters or 0) - 2 * embedding)
    layer = all_layers // max(1, model.layers or 1)
    all_layers, layer = (size // section.tensor_parallel_size for size in (all_layers, layer))
    gathered = (2 + section.forward_prefetch) * layer if section.reshard_after_forward else all_layers
    return itemsize * (gathered + layer + 4 * embedding)


def activation_bytes(config: PPOConfig, model: ModelFiles, itemsize: int, ranks: int) -> int:
    """Return the memory of one micro-batch: activations for the backward pass, and those of the output head."""
    data, actor = config.data, config.actor_rollout_ref.actor
    shared = actor_sequence_parallel(actor)
    divided = actor.fsdp_config.tensor_parallel_size
    tokens = _micro_batch_tokens(config, actor, ranks // divided, shared)
    section = config.actor_rollout_ref.model
    layers = _layer_activation_bytes(model, tokens, itemsize, section, longest_sample(config), divided)
    responses = tokens * data.max_response_length // (data.max_prompt_length + data.max_response_length)
    # The rank that holds the end of a row has responses only.
    responses = min(responses * shared, tokens)
    return layers + head_bytes(config, model, responses, itemsize)


def head_bytes(config: PPOConfig, model: ModelFiles, responses: int, itemsize: int) -> int:
    """Return the memory of the output head in an update: tiles of the logits, or all logits and their gradients.

    A model whose logits the trainer cannot compute in tiles is not known here; the trainer then logs a warning.

    Args:
        responses: response tokens of a micro-batch.
        itemsize: bytes of the compute dtype.
    """
    logits = responses * (model.number("vocab_size") or 0)
    if config.actor_rollout_ref.model.use_fused_kernels is False:
        return 2 * logits * itemsize + min(_LOGITS_CHUNK, 4 * logits * itemsize)
    exact = itemsize_of("float32")
    # The gradient of the hidden states is summed in float32.
    return min(_LOGITS_TILES, 4 * logits * exact) + responses * (model.hidden or 0) * exact


def critic_activation_bytes(config: PPOConfig, model: ModelFiles, device: str, ranks: int) -> int:
    """Return the memory of one micro-batch of the critic, which has no logits."""
    critic = resolve_critic(config)
    tokens = _micro_batch_tokens(config, critic, ranks, critic_sequence_parallel(critic))
    size = itemsize_of(choose_dtype(device, critic.fsdp.compute_dtype).name)
    return _layer_activation_bytes(model, tokens, size, critic.model, longest_sample(config))


def _micro_batch_tokens(
    config: PPOConfig, section: ActorConfig | CriticConfig, ranks: int, sequence_parallel: int
) -> int:
    """Return one rank's maximum tokens of a micro-batch of the actor or of the resolved critic.

    Args:
        sequence_parallel: ranks that share a micro-batch.
    """
    assert section.ppo_mini_batch_size is not None
    longest = longest_sample(config)
    samples = max(1, section.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n * sequence_parallel // ranks)
    if section.use_dynamic_bsz:
        return min(-(-samples * longest // sequence_parallel), section.ppo_max_token_len_per_gpu)
    return -(-min(samples, section.ppo_micro_batch_size_per_gpu or samples) * longest // sequence_parallel)


def offloaded_activation_bytes(config: PPOConfig, model: ModelFiles, critic: ModelFiles | None, itemsize: int) -> int:
    """Return the host memory of one rank for `enable_activation_offload`.

    Pinned memory is allocated in powers of 2. Actor and critic use it one after the other.
    """
    sizes, ranks = [0], trainer_ranks(config)
    if config.actor_rollout_ref.model.enable_activation_offload:
        actor = config.actor_rollout_ref.actor
        tokens = _micro_batch_tokens(config, actor, ranks, actor_sequence_parallel(actor))
        sizes.append(_power_of_2(tokens * (model.hidden or 0) * itemsize) * (model.layers or 0))
    if critic is not None and config.critic.model.enable_activation_offload:
        resolved = resolve_critic(config)
        tokens = _micro_batch_tokens(config, resolved, ranks, critic_sequence_parallel(resolved))
        sizes.append(_power_of_2(tokens * (critic.hidden or 0) * itemsize) * (critic.layers or 0))
    return max(sizes)


def _power_of_2(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _layer_activation_bytes(
    model: ModelFiles,
    tokens: int,
    itemsize: int,
    section: ModelConfig | CriticModelConfig,
    longest: int,
    divided: int = 1,
) -> int:
    """Return the size of the layers' activations; with gradient checkpointing the layers' inputs and one layer.

    Args:
        tokens: tokens of a micro-batch, in rows of at most `longest`.
        section: with activation offload, only the inputs of three layers are on the device: one in use, one on its
            way to the host or back, and one that is being freed.
        divided: ranks that share each layer. The input, the output and the residual of its parts are not divided.
    """
    hidden, layers = model.hidden or 0, model.layers or 0
    inner = model.number("intermediate_size") or 4 * hidden
    one_layer = tokens * (8 * hidden + 4 * inner // divided) * itemsize
    one_layer += tokens * min(tokens, longest) * (model.heads or 0) * score_bytes(model, itemsize)
    if not section.enable_gradient_checkpointing:
        return one_layer * layers
    inputs = min(3, layers) if section.enable_activation_offload else layers
    return tokens * hidden * inputs * itemsize + one_layer


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
