"""`actor_rollout_ref.actor`: the policy's loss, optimizer, batches and sharding; and parts that `ref` shares."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.schema import key, planned, section

_FSDP = "use strategy=fsdp2, the only training engine so far"


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = key(1e-6, "learning rate after the warm-up", at_least=0)
    lr_warmup_steps: int | None = key(
        -1, "linear warm-up; negative or null for lr_warmup_steps_ratio", unit="training steps"
    )
    lr_warmup_steps_ratio: float = key(0.0, "linear warm-up as a share of all steps", at_least=0, at_most=1)
    lr_scheduler_type: str = key("constant", "schedule after the warm-up", choices=("constant", "cosine"))
    min_lr_ratio: float | None = key(0.0, "end of the cosine as a share of lr", at_least=0, at_most=1)
    total_training_steps: int | None = key(
        -1, "length of the schedule; negative or null for the run's", unit="training steps"
    )
    weight_decay: float = key(0.01, "decoupled weight decay", at_least=0)
    betas: list[float] = key([0.9, 0.999], "decay rates of AdamW's two moments", at_least=0, below=1, items=2)
    clip_grad: float | None = key(1.0, "largest norm of the gradient, null for no clipping", above=0)
    num_cycles: float = planned(0.5, "another number of cosine cycles")
    optimizer: str = planned("AdamW", "another optimizer")
    optimizer_impl: str = planned("torch.optim", "another optimizer")
    override_optimizer_config: dict[str, Any] | None = planned(None, "further optimizer settings")


@dataclass
class FSDPConfig:
    """How a model is sharded over the trainer's ranks, with FSDP2."""

    model_dtype: str = key(
        "fp32",
        "dtype of the master weights, and of the optimizer's state",
        choices=("fp32", "bf16", "float32", "bfloat16"),
    )
    dtype: str = key(
        "auto",
        "dtype to compute in; auto: bfloat16 where the device is fast in it, else float32",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16"),
        planned=("float16", "fp16"),
        use="use auto, float32 or bfloat16",
    )
    reshard_after_forward: bool = key(True, "free a layer's gathered weights between forward and backward")
    fsdp_size: int = planned(-1, "hybrid sharding", "use -1: all ranks share one copy of the model")
    param_offload: bool = planned(False, "offload to the host's memory")
    optimizer_offload: bool = planned(False, "offload to the host's memory")
    offload_policy: bool = planned(False, "offload to the host's memory")
    forward_prefetch: bool = planned(False, "explicit prefetch")
    ulysses_sequence_parallel_size: int = planned(1, "sequence parallelism")
    use_torch_compile: bool = planned(False, "torch.compile in training")
    entropy_checkpointing: bool = planned(False, "recomputed entropy")
    entropy_from_logits_with_chunking: bool = key(False, "entropy is computed in chunks, which both values mean")


@dataclass
class MegatronConfig:
    """Megatron, known and not supported yet."""

    tensor_model_parallel_size: int = planned(1, "Megatron", _FSDP)
    pipeline_model_parallel_size: int = planned(1, "Megatron", _FSDP)
    virtual_pipeline_model_parallel_size: int | None = planned(None, "Megatron", _FSDP)
    expert_model_parallel_size: int = planned(1, "Megatron", _FSDP)
    expert_tensor_parallel_size: int | None = planned(None, "Megatron", _FSDP)
    context_parallel_size: int = planned(1, "Megatron", _FSDP)
    sequence_parallel: bool = planned(True, "Megatron", _FSDP)
    param_offload: bool = planned(False, "Megatron", _FSDP)
    grad_offload: bool = planned(False, "Megatron", _FSDP)
    optimizer_offload: bool = planned(False, "Megatron", _FSDP)
    use_mbridge: bool = planned(True, "Megatron", _FSDP)
    vanilla_mbridge: bool = planned(False, "Megatron", _FSDP)
    use_dist_checkpointing: bool = planned(False, "Megatron", _FSDP)
    dist_checkpointing_path: str | None = planned(None, "Megatron", _FSDP)
    override_transformer_config: dict[str, Any] = planned({}, "Megatron", _FSDP)
    override_ddp_config: dict[str, Any] = planned({}, "Megatron", _FSDP)


@dataclass
class CheckpointConfig:
    """Parts of a checkpoint."""

    save_contents: list[str] = key(
        ["model", "optimizer", "extra"],
        "parts to save; hf_model adds a Hugging Face directory",
        choices=names.CHECKPOINT_CONTENTS,
    )
    load_contents: list[str] = key(
        ["model", "optimizer", "extra"], "parts to load when a run is resumed", choices=names.CHECKPOINT_CONTENTS
    )
    async_save: bool = planned(False, "saving in the background")


@dataclass
class PolicyLossConfig:
    """Which policy loss, and the settings of single ones; docs/algorithms.md has their formulas."""

    loss_mode: str = key(
        "vanilla",
        "policy loss; vanilla is PPO's, clipped",
        choices=names.POLICY_LOSSES,
    )
    clip_cov_ratio: float = key(0.0002, "clip_cov: share of tokens whose gradient is dropped", above=0, at_most=1)
    clip_cov_lb: float = key(1.0, "clip_cov: tokens to choose from have a covariance above this")
    clip_cov_ub: float = key(5.0, "clip_cov: and below this")
    kl_cov_ratio: float = key(0.0002, "kl_cov: share of tokens that are penalised", above=0, at_most=1)
    ppo_kl_coef: float = key(0.1, "kl_cov: weight of their penalty", at_least=0)
    dro_beta: float | None = key(None, "dro: weight of the quadratic penalty, which has no default", above=0)


@dataclass
class ActorConfig:
    """The policy's loss, optimizer, batches and sharding."""

    strategy: str = key(
        "fsdp",
        "training engine; fsdp and fsdp2 both mean FSDP2",
        choices=("fsdp", "fsdp2"),
        planned=("megatron", "veomni", "torchtitan"),
        use=_FSDP,
    )
    ppo_mini_batch_size: int = key(
        256, "prompts of one optimizer step; it holds rollout.n samples of each", unit="prompts", at_least=1
    )
    ppo_micro_batch_size_per_gpu: int | None = key(
        None, "samples a rank runs forward and backward at once", unit="samples", at_least=1
    )
    use_dynamic_bsz: bool = key(False, "fill micro-batches up to ppo_max_token_len_per_gpu instead")
    ppo_max_token_len_per_gpu: int = key(
        16384, "tokens a rank runs forward and backward at once, padding included", unit="tokens", at_least=1
    )
    ppo_epochs: int = key(1, "passes over the samples of a step", at_least=1)
    clip_ratio: float = key(0.2, "PPO's clip range where low or high is null", above=0)
    clip_ratio_low: float | None = key(
        0.2,
        "the ratio is kept above 1 - this; from 1 on it has no lower bound; on dppo_*: bound of the divergence",
        above=0,
    )
    clip_ratio_high: float | None = key(
        0.2, "the ratio is kept below 1 + this; on dppo_*: bound of the divergence", above=0
    )
    clip_ratio_c: float = key(
        3.0, "dual clip: bound of the ratio where the advantage is negative; on dppo_*: bound of every ratio", above=1
    )
    tau_pos: float = key(1.0, "sapo: sharpness of the gate where the advantage is positive", above=0)
    tau_neg: float = key(1.05, "sapo: sharpness of the gate elsewhere", above=0)
    loss_agg_mode: str = key("token-mean", "how token losses become one number", choices=names.LOSS_AGG_MODES)
    loss_scale_factor: float | None = key(
        None, "divisor of seq-mean-token-sum-norm, null for data.max_response_length", unit="tokens", above=0
    )
    entropy_coeff: float = key(0.0, "weight of the entropy bonus")
    use_kl_loss: bool = key(False, "add the KL divergence from the reference model to the loss")
    kl_loss_coef: float = key(0.001, "its weight", at_least=0)
    kl_loss_type: str = key(
        "low_var_kl",
        "its estimator; a + behind the name takes the gradient of k2",
        choices=names.KL_TYPES,
        planned=names.UNSUPPORTED_KL_TYPES,
        use="use low_var_kl",
    )
    policy_loss: PolicyLossConfig = section(PolicyLossConfig, "which policy loss")
    optim: OptimConfig = section(OptimConfig, "AdamW and its schedule")
    fsdp_config: FSDPConfig = section(FSDPConfig, "how the model is sharded over the trainer's ranks")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "parts of a checkpoint")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported yet")
    shuffle: bool = planned(False, "shuffled mini-batches")
    use_torch_compile: bool = planned(False, "torch.compile in training")
    ulysses_sequence_parallel_size: int = planned(1, "sequence parallelism")
    entropy_checkpointing: bool = planned(False, "recomputed entropy")
    entropy_from_logits_with_chunking: bool = key(False, "entropy is computed in chunks, which both values mean")
    ppo_micro_batch_size: int | None = planned(
        None, "a micro-batch size over all ranks", "use ppo_micro_batch_size_per_gpu, which counts samples per rank"
    )
