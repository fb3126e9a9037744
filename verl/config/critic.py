"""`critic`: the value model of PPO."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.actor import CheckpointConfig, FSDPConfig, MegatronConfig, OptimConfig
from verl.config.conditions import has_own_memory, micro_batches, when
from verl.config.model import SHM
from verl.config.profiler import RoleProfilerConfig
from verl.config.schema import ConfigSection, key, section, unsupported, without_effect

_LORA = "leave the key out: the whole critic is trained"
_IN_SAMPLES = micro_batches("use_dynamic_bsz", in_tokens=False)
_IN_TOKENS = micro_batches("use_dynamic_bsz", in_tokens=True)


@dataclass
class CriticOptimConfig(OptimConfig):
    """AdamW and its learning rate schedule."""

    lr: float = key(1e-5, "learning rate after the warmup", at_least=0)


@dataclass
class CriticModelConfig(ConfigSection):
    """The critic's model and how it is loaded."""

    path: str | None = key(
        None,
        "directory of a Hugging Face model, or its name on the hub: a causal language model, which gets a new scalar "
        "head, or a saved critic; it must use the policy's token ids",
        path=True,
        hub=True,
    )
    tokenizer_path: str | None = key(
        None,
        "directory of the tokenizer that is saved with the critic; null: the policy's tokenizer",
        path=True,
        hub=True,
        only_with=when(
            "critic.checkpoint.save_contents",
            "hf_model",
            words="`hf_model` in `critic.checkpoint.save_contents`",
            reason="without hf_model in critic.checkpoint.save_contents",
        ),
    )
    trust_remote_code: bool | None = key(None, "run Python code that comes with the model; null: the policy's value")
    override_config: dict[str, Any] = key(
        {}, "fields of the model's config with other values, such as attn_implementation"
    )
    external_lib: str | list[str] | None = unsupported(
        None, "modules of the critic only", "use actor_rollout_ref.model.external_lib, which the same ranks import"
    )
    enable_gradient_checkpointing: bool = key(True, "save memory by computing activations again in the backward pass")
    use_remove_padding: bool = key(
        True,
        "run the sequences of a micro-batch without padding, in one row; False: pad them to the maximum lengths",
    )
    use_shm: bool = without_effect(False, SHM)
    enable_activation_offload: bool = key(
        False,
        "keep the inputs of the layers in host memory between forward and backward pass; needs "
        "enable_gradient_checkpointing",
        only_with=has_own_memory,
    )
    lora_rank: int = unsupported(0, "LoRA in the critic", _LORA)
    lora_alpha: int = unsupported(16, "LoRA in the critic", _LORA)
    target_modules: str | list[str] = unsupported("all-linear", "LoRA in the critic", _LORA)


@dataclass
class CriticConfig(ConfigSection):
    """Loss, optimizer, batches and sharding of the value model; most null values mean the actor's value."""

    enable: bool | None = key(None, "train a critic; null: if the estimator needs one")
    strategy: str | None = key(
        None,
        "training engine; null: the actor's",
        choices=("fsdp", "fsdp2"),
        unsupported=names.UNSUPPORTED_ENGINES,
        use="use null or fsdp2",
    )
    ppo_mini_batch_size: int | None = key(
        None,
        "prompts per optimizer step, with rollout.n samples each; null: the actor's value",
        unit="prompts",
        at_least=1,
    )
    ppo_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples per forward and backward pass of a rank; null: the actor's value",
        unit="samples",
        at_least=1,
        only_with=_IN_SAMPLES,
    )
    forward_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples per forward pass without gradient; null: ppo_micro_batch_size_per_gpu",
        unit="samples",
        at_least=1,
        only_with=_IN_SAMPLES,
    )
    use_dynamic_bsz: bool | None = key(
        None,
        "fill each micro-batch with samples up to ppo_max_token_len_per_gpu tokens, instead of "
        "ppo_micro_batch_size_per_gpu samples; null: the actor's value",
    )
    ppo_max_token_len_per_gpu: int = key(
        32768,
        "tokens per forward and backward pass of a rank, including padding",
        unit="tokens",
        at_least=1,
        only_with=_IN_TOKENS,
    )
    forward_max_token_len_per_gpu: int | None = key(
        None,
        "tokens per forward pass without gradient; null: ppo_max_token_len_per_gpu",
        unit="tokens",
        at_least=1,
        only_with=_IN_TOKENS,
    )
    ppo_epochs: int | None = key(
        None, "passes over the samples of a training step; null: the actor's value", at_least=1
    )
    cliprange_value: float = key(
        0.5, "distance between a new value and the old value beyond which the value loss is clipped", above=0
    )
    loss_agg_mode: str | None = key(
        None, "aggregation of token losses to a scalar; null: the actor's value", choices=names.LOSS_AGG_MODES
    )
    optim: CriticOptimConfig = section(CriticOptimConfig, "AdamW and its learning rate schedule")
    fsdp: FSDPConfig = section(FSDPConfig, "sharding of the model over the trainer's ranks")
    model: CriticModelConfig = section(CriticModelConfig, "the critic's model and how it is loaded")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "parts of a checkpoint")
    profiler: RoleProfilerConfig = section(RoleProfilerConfig, "device profile of this role's stages")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported")
    shuffle: bool = unsupported(False, "shuffled mini-batches")
    data_loader_seed: int = unsupported(42, "a seed for shuffled mini-batches")
    ulysses_sequence_parallel_size: int = key(
        1,
        "neighboring ranks that share the sequences of a micro-batch; see actor_rollout_ref.actor",
        unit="ranks",
        at_least=1,
    )
    ppo_micro_batch_size: int | None = unsupported(
        None, "a micro-batch size over all ranks", "use ppo_micro_batch_size_per_gpu, which counts samples per rank"
    )
    forward_micro_batch_size: int | None = unsupported(
        None, "a micro-batch size over all ranks", "use forward_micro_batch_size_per_gpu, which counts samples per rank"
    )
