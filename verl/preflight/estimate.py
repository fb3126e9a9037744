"""How much memory a run will take: the large, predictable parts, and measured sizes of bare processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config.lora import adapter_parameters, lora_options
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_ref, resolve_critic
from verl.config.weight_updates import full_update_reason
from verl.utils.dtypes import choose_dtype
from verl.utils.model_dir.kv_cache import cpu_kv_cache_bytes
from verl.utils.model_dir.model_files import ModelFiles
from verl.utils.quantization.schemes import weight_format_class

_MIB, _GIB = 1 << 20, 1 << 30
# Resident memory of processes that hold no model yet.
_TRAINER_BASE = 600 * _MIB
_REPLICA_BASE = 1100 * _MIB
_DRIVER_BASE = 1200 * _MIB  # with Ray's own processes
_REWARD_WORKER = 60 * _MIB
_LOGITS_CHUNK = 2 * 64 * _MIB
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of host memory, by process.

    Attributes:
        trainer_bytes: each trainer rank.
        replica_bytes: each replica, key-value cache included; `cache_bytes` is that cache.
        other_bytes: driver, Ray, reward workers and the buckets of a weight update.
        ranks, replicas: how many of them are on the driver's node, at most.
        total_bytes: of that node.
    """

    trainer_bytes: int
    replica_bytes: int
    cache_bytes: int
    other_bytes: int
    ranks: int
    replicas: int
    total_bytes: int

    def parts(self) -> list[tuple[str, str]]:
        """Label and size of each part."""
        gib = [f"{part / _GIB:.1f} GiB" for part in (self.trainer_bytes, self.replica_bytes, self.other_bytes)]
        parts = [("trainer rank", f"{gib[0]} x {self.ranks}"), ("replica", f"{gib[1]} x {self.replicas}")]
        return [*(parts if self.replicas else parts[:1]), ("the rest", gib[2])]


def estimate_memory(
    config: PPOConfig,
    model: ModelFiles,
    *,
    device: str,
    compute_dtype: str,
    rollout_dtype: str,
    ranks: int,
    replicas: int,
    reward_workers: int,
    apart: bool = False,
    critic: ModelFiles | None = None,
) -> MemoryEstimate | None:
    """What the run takes of the host's memory; None where the model's files do not tell its size.

    Models on an accelerator take its memory, so that only bare processes count here.

    Args:
        apart: replicas are on other nodes.
    """
    if model.parameters is None:
        return None
    rollout = config.actor_rollout_ref.rollout
    itemsize = _ITEMSIZE[rollout_dtype]
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * _MIB
    in_flight = rollout.checkpoint_engine.buckets_in_flight
    others = in_flight * min(bucket, model.parameters * itemsize) + _DRIVER_BASE + reward_workers * _REWARD_WORKER
    trainer, replica, cache = _TRAINER_BASE, _REPLICA_BASE, 0
    if device == "cpu":
        lora = lora_options(config.actor_rollout_ref.model)
        adapters = None if lora is None else adapter_parameters(lora, model.shapes)
        trainer += trainer_state_bytes(config, model.parameters, ranks, adapters)
        activations = activation_bytes(config, model, _ITEMSIZE[compute_dtype], ranks)
        if critic is not None and critic.parameters is not None:
            trainer += critic_state_bytes(config, critic.parameters, ranks)
            # Actor and critic take turns.
            activations = max(activations, critic_activation_bytes(config, critic, device, ranks))
        trainer += gathered_bytes(model, _ITEMSIZE[compute_dtype]) + activations
        length = rollout.max_model_len or config.data.max_prompt_length + config.data.max_response_length
        cache = cpu_kv_cache_bytes(model, itemsize, length, rollout.max_num_seqs)
        scheme = weight_format_class(rollout.quantization)
        held = scheme.estimated_bytes(model.parameters, itemsize)
        computes = model.parameters * itemsize
        # While a whole update is loaded both layouts are there; what computes is packed or dequantized besides.
        replica += computes + 2 * held + cache
        if full_update_reason(rollout, device) is None:
            # What was sent last.
            trainer += (held if scheme.trainer_encodes else computes) // ranks
    own, shared = ranks // config.trainer.nnodes, 0 if apart else replicas // config.trainer.nnodes
    total = trainer * own + replica * shared + others
    return MemoryEstimate(trainer, replica, cache, others, own, shared, total)


def trainer_state_bytes(config: PPOConfig, parameters: int, ranks: int, adapters: int | None = None) -> int:
    """Sharded over the ranks: master weights, gradients and AdamW's two moments, and the reference model's weights.

    With `adapters` trained parameters in float32, the model itself has neither gradients nor moments.
    """
    master = _ITEMSIZE[config.actor_rollout_ref.actor.fsdp_config.model_dtype]
    trained = parameters * (4 if adapters is None else 1) * master + (adapters or 0) * 4 * _ITEMSIZE["float32"]
    return trained // ranks + ref_state_bytes(config, parameters, ranks)


def gathered_bytes(model: ModelFiles, itemsize: int) -> int:
    """The layer that is computed and the next one are gathered, with gradients of one; embedding and head stay."""
    embedding = (model.number("vocab_size") or 0) * (model.hidden or 0)
    layer = max(0, (model.parameters or 0) - 2 * embedding) // max(1, model.layers or 1)
    return itemsize * (3 * layer + 4 * embedding)


def ref_state_bytes(config: PPOConfig, parameters: int, ranks: int) -> int:
    """Sharded over the ranks: the reference model's weights, where there is one."""
    if not needs_ref(config):
        return 0
    return parameters * _ITEMSIZE[config.actor_rollout_ref.ref.fsdp_config.model_dtype] // ranks


def critic_state_bytes(config: PPOConfig, parameters: int, ranks: int) -> int:
    """Sharded over the ranks: the critic's master weights, gradients and AdamW's two moments."""
    return parameters * 4 * _ITEMSIZE[config.critic.fsdp.model_dtype] // ranks


def activation_bytes(config: PPOConfig, model: ModelFiles, itemsize: int, ranks: int) -> int:
    """Of one micro-batch: what the layers keep for the backward pass, logits of the response tokens with gradient."""
    data = config.data
    tokens = _micro_batch_tokens(config, config.actor_rollout_ref.actor, ranks)
    kept = _kept_bytes(model, tokens, itemsize, config.actor_rollout_ref.model.enable_gradient_checkpointing)
    responses = tokens * data.max_response_length // (data.max_prompt_length + data.max_response_length)
    logits = 2 * responses * (model.number("vocab_size") or 0) * itemsize
    return kept + logits + min(_LOGITS_CHUNK, 2 * logits)


def critic_activation_bytes(config: PPOConfig, model: ModelFiles, device: str, ranks: int) -> int:
    """Of one micro-batch of the critic, which has no logits."""
    critic = resolve_critic(config)
    itemsize = _ITEMSIZE[choose_dtype(device, critic.fsdp.dtype).name]
    tokens = _micro_batch_tokens(config, critic, ranks)
    return _kept_bytes(model, tokens, itemsize, critic.model.enable_gradient_checkpointing)


def _micro_batch_tokens(config: PPOConfig, section: Any, ranks: int) -> int:
    longest = config.data.max_prompt_length + config.data.max_response_length
    samples = max(1, section.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // ranks)
    if section.use_dynamic_bsz:
        return min(samples * longest, section.ppo_max_token_len_per_gpu)
    return min(samples, section.ppo_micro_batch_size_per_gpu or samples) * longest


def _kept_bytes(model: ModelFiles, tokens: int, itemsize: int, recomputed: bool) -> int:
    hidden, layers = model.hidden or 0, model.layers or 0
    inner = model.number("intermediate_size") or 4 * hidden
    one_layer = tokens * (8 * hidden + 4 * inner) * itemsize
    return tokens * hidden * layers * itemsize + one_layer if recomputed else one_layer * layers
