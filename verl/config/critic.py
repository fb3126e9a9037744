"""`critic`: the value model of PPO."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.actor import CheckpointConfig, FSDPConfig, MegatronConfig, OptimConfig
from verl.config.schema import key, planned, section

_LORA = "leave it out: the whole critic is trained"


@dataclass
class CriticOptimConfig(OptimConfig):
    """AdamW and its schedule, at a learning rate of its own."""

    lr: float = key(1e-5, "learning rate after the warm-up", at_least=0)


@dataclass
class CriticModelConfig:
    """The model and how it is loaded."""

    path: str | None = key(
        None,
        "directory of a Hugging Face model: a causal language model, which gets a new scalar head, or a saved critic; "
        "its tokens are the policy's",
        path=True,
        hub=True,
    )
    tokenizer_path: str | None = key(
        None, "directory of the tokenizer saved with it, null for the policy's", path=True, hub=True
    )
    trust_remote_code: bool | None = key(None, "run Python code that comes with the model, null as the policy")
    override_config: dict[str, Any] = key({}, "fields of the model's config to replace, e.g. attn_implementation")
    external_lib: str | list[str] | None = planned(
        None, "modules imported for the critic alone", "use actor_rollout_ref.model.external_lib, on the same ranks"
    )
    enable_gradient_checkpointing: bool = key(True, "recompute activations in the backward pass to save memory")
    use_remove_padding: bool = key(
        True, "give the model the real tokens alone, all sequences of a micro-batch in a row; else pad to the caps"
    )
    use_shm: bool = planned(False, "staging the model in shared memory")
    enable_activation_offload: bool = planned(False, "activation offload")
    lora_rank: int = planned(0, "LoRA in the critic", _LORA)
    lora_alpha: int = planned(16, "LoRA in the critic", _LORA)
    target_modules: str | list[str] = planned("all-linear", "LoRA in the critic", _LORA)


@dataclass
class CriticConfig:
    """The value model's loss, optimizer, batches and sharding; null stands for the actor's value in most keys."""

    enable: bool | None = key(None, "whether there is a critic, null for where the estimator needs one")
    strategy: str | None = key(
        None,
        "training engine, null for the actor's",
        choices=("fsdp", "fsdp2"),
        planned=("megatron", "veomni", "torchtitan"),
        use="use null or fsdp2",
    )
    ppo_mini_batch_size: int | None = key(
        None,
        "prompts of one optimizer step, rollout.n samples of each; null for the actor's",
        unit="prompts",
        at_least=1,
    )
    ppo_micro_batch_size_per_gpu: int | None = key(
        None, "samples a rank runs forward and backward at once, null for the actor's", unit="samples", at_least=1
    )
    forward_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples a rank runs forward at once, null for ppo_micro_batch_size_per_gpu",
        unit="samples",
        at_least=1,
    )
    use_dynamic_bsz: bool | None = key(
        None, "fill micro-batches up to ppo_max_token_len_per_gpu instead, null as the actor"
    )
    ppo_max_token_len_per_gpu: int = key(
        32768, "tokens a rank runs forward and backward at once, padding included", unit="tokens", at_least=1
    )
    forward_max_token_len_per_gpu: int | None = key(
        None, "tokens a rank runs forward at once, null for ppo_max_token_len_per_gpu", unit="tokens", at_least=1
    )
    ppo_epochs: int | None = key(None, "passes over the samples of a step, null for the actor's", at_least=1)
    cliprange_value: float = key(0.5, "how far a value may move from the old one before its error is clipped", above=0)
    loss_agg_mode: str | None = key(
        None, "how token losses become one number, null for the actor's", choices=names.LOSS_AGG_MODES
    )
    optim: CriticOptimConfig = section(CriticOptimConfig, "AdamW and its schedule")
    fsdp: FSDPConfig = section(FSDPConfig, "how the model is sharded over the trainer's ranks")
    model: CriticModelConfig = section(CriticModelConfig, "the model and how it is loaded")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "parts of a checkpoint")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported yet")
    shuffle: bool = planned(False, "shuffled mini-batches")
    data_loader_seed: int = planned(42, "a seed of shuffled mini-batches")
    ulysses_sequence_parallel_size: int = planned(1, "sequence parallelism")
    ppo_micro_batch_size: int | None = planned(
        None, "a micro-batch size over all ranks", "use ppo_micro_batch_size_per_gpu, which counts samples per rank"
    )
    forward_micro_batch_size: int | None = planned(
        None, "a micro-batch size over all ranks", "use forward_micro_batch_size_per_gpu, which counts samples per rank"
    )
