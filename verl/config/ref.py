"""`actor_rollout_ref.ref`: the frozen reference model of the KL terms."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.config.actor import FSDPConfig, MegatronConfig
from verl.config.schema import key, planned, section


@dataclass
class RefFSDPConfig(FSDPConfig):
    """How the reference model is sharded, which no optimizer changes."""

    param_offload: bool = key(False, "keep its weights in the host's memory while they are not used")


@dataclass
class RefConfig:
    """The reference model; held only where actor.use_kl_loss asks for it."""

    strategy: str | None = key(
        None,
        "engine, null for the actor's",
        choices=("fsdp", "fsdp2"),
        planned=("megatron", "veomni", "torchtitan"),
        use="use null or fsdp2",
    )
    log_prob_micro_batch_size_per_gpu: int | None = key(
        None, "samples a rank runs forward at once, null for the actor's", unit="samples", at_least=1
    )
    log_prob_use_dynamic_bsz: bool | None = key(
        None, "fill micro-batches up to log_prob_max_token_len_per_gpu instead, null as the actor"
    )
    log_prob_max_token_len_per_gpu: int | None = key(
        None, "tokens a rank runs forward at once, null for the actor's", unit="tokens", at_least=1
    )
    fsdp_config: RefFSDPConfig = section(RefFSDPConfig, "how the model is sharded over the trainer's ranks")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported yet")
    use_torch_compile: bool = planned(False, "torch.compile in training")
    ulysses_sequence_parallel_size: int = planned(1, "sequence parallelism")
    entropy_from_logits_with_chunking: bool = key(False, "entropy is computed in chunks, which both values mean")
    log_prob_micro_batch_size: int | None = planned(
        None, "a micro-batch size over all ranks", "use log_prob_micro_batch_size_per_gpu, samples per rank"
    )
