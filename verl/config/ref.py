"""`actor_rollout_ref.ref`: the frozen reference model of the KL terms."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config import names
from verl.config.actor import CHUNKED_ENTROPY, NO_TORCH_COMPILE, FSDPConfig, MegatronConfig
from verl.config.conditions import micro_batches
from verl.config.profiler import RoleProfilerConfig
from verl.config.schema import ConfigSection, key, section, unsupported, without_effect

_IN_SAMPLES = micro_batches("log_prob_use_dynamic_bsz", in_tokens=False)
_IN_TOKENS = micro_batches("log_prob_use_dynamic_bsz", in_tokens=True)


@dataclass
class RefFSDPConfig(FSDPConfig):
    """Sharding of the reference model over the trainer's ranks with FSDP2."""

    optimizer_offload: bool = without_effect(False, "the reference model has no optimizer")


@dataclass
class RefConfig(ConfigSection):
    """The reference model; a run holds it only for actor.use_kl_loss or algorithm.use_kl_in_reward."""

    strategy: str | None = key(
        None,
        "training engine; null: the actor's",
        choices=("fsdp", "fsdp2"),
        unsupported=names.UNSUPPORTED_ENGINES,
        use="use null or fsdp2",
    )
    log_prob_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples per forward pass of a rank; null: the actor's value",
        unit="samples",
        at_least=1,
        only_with=_IN_SAMPLES,
    )
    log_prob_use_dynamic_bsz: bool | None = key(
        None,
        "fill each micro-batch with samples up to log_prob_max_token_len_per_gpu tokens, instead of "
        "log_prob_micro_batch_size_per_gpu samples; null: the actor's value",
    )
    log_prob_max_token_len_per_gpu: int | None = key(
        None,
        "tokens per forward pass of a rank; null: the actor's value",
        unit="tokens",
        at_least=1,
        only_with=_IN_TOKENS,
    )
    fsdp_config: RefFSDPConfig = section(RefFSDPConfig, "sharding of the model over the trainer's ranks")
    profiler: RoleProfilerConfig = section(RoleProfilerConfig, "device profile of this role's stages")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported")
    use_torch_compile: bool = without_effect(False, NO_TORCH_COMPILE)
    ulysses_sequence_parallel_size: int | None = key(
        None,
        "neighboring ranks that share the sequences of a micro-batch; null: the actor's value",
        unit="ranks",
        at_least=1,
    )
    entropy_checkpointing: bool = without_effect(False, "the reference model has no backward pass")
    entropy_from_logits_with_chunking: bool = without_effect(False, CHUNKED_ENTROPY)
    log_prob_micro_batch_size: int | None = unsupported(
        None,
        "a micro-batch size over all ranks",
        "use log_prob_micro_batch_size_per_gpu, which counts samples per rank",
    )
