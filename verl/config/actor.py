"""`actor_rollout_ref.actor`: loss, optimizer, batches and sharding of the policy. `ref` and `critic` share parts."""

# ruff: noqa: RUF009  (key, unsupported and section return dataclass fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from verl.config import names
from verl.config.conditions import any_of, first_of, has_own_memory, quantization_aware, read_by_loss, unless, when
from verl.config.old_log_probs import OldLogProbsConfig
from verl.config.profiler import RoleProfilerConfig
from verl.config.schema import ConfigSection, key, section, unsupported, without_effect

NO_TORCH_COMPILE = "the trainer computes without torch.compile"
CHUNKED_ENTROPY = "the entropy is always computed in chunks"
RECOMPUTED_ENTROPY = "the backward pass always computes the entropy again"
_HF_MODEL = "hf_model"
_DTYPES, _FLOAT16 = ("float32", "fp32", "bfloat16", "bf16"), ("float16", "fp16")
_FSDP = "use strategy=fsdp2, the only supported training engine"


@dataclass
class OptimConfig(ConfigSection):
    """AdamW and its learning rate schedule."""

    lr: float = key(1e-6, "learning rate after the warmup", at_least=0)
    lr_warmup_steps: int | None = key(
        -1, "steps of linear warmup; null or negative: lr_warmup_steps_ratio decides", unit="training steps"
    )
    lr_warmup_steps_ratio: float = key(
        0.0,
        "steps of linear warmup as a fraction of all steps",
        at_least=0,
        at_most=1,
        only_with=unless("lr_warmup_steps", at_least=0),
    )
    lr_scheduler_type: str = key("constant", "schedule after the warmup", choices=("constant", "cosine"))
    min_lr_ratio: float | None = key(
        0.0,
        "final learning rate of the cosine schedule as a fraction of lr",
        at_least=0,
        at_most=1,
        only_with=when("lr_scheduler_type", "cosine"),
    )
    total_training_steps: int | None = key(
        -1,
        "length of the schedule; null or negative: the steps of the run",
        unit="training steps",
        only_with=any_of(
            when("lr_scheduler_type", "cosine"),
            first_of(unless("lr_warmup_steps", at_least=0), unless("lr_warmup_steps_ratio", 0)),
            reason="with a constant learning rate and without a warmup by lr_warmup_steps_ratio",
            words="`lr_scheduler_type=cosine` or a warmup by `lr_warmup_steps_ratio`",
        ),
    )
    weight_decay: float = key(0.01, "decoupled weight decay", at_least=0)
    betas: list[float] = key([0.9, 0.999], "decay rates of AdamW's two moments", at_least=0, below=1, items=2)
    clip_grad: float | None = key(1.0, "maximum norm of the gradient; null: no clipping", above=0)
    num_cycles: float = unsupported(0.5, "another number of cosine cycles")
    optimizer: str = unsupported("AdamW", "another optimizer")
    optimizer_impl: str = unsupported("torch.optim", "another optimizer")
    override_optimizer_config: dict[str, Any] | None = unsupported(None, "further optimizer settings")


def _enable_qat(default: str | bool) -> Any:
    return key(
        default,
        "use the engine's rounded weights and inputs in forward passes; gradients reach the unrounded weights; "
        "auto: if the rollout is quantized in a format that has it",
        choices=("auto", True, False),
    )


@dataclass
class QatConfig(ConfigSection):
    """Quantization-aware training: the trainer computes with the numbers that the quantized rollout engine uses."""

    enable: str | bool = _enable_qat(False)
    mode: str | None = key(
        None,
        "w8a8_mxfp8, w4a8_mxfp: as an engine in this format; w8a16_mxfp8: round the weights, not the inputs; null: as "
        "the engine",
        choices=tuple(names.QAT_MODES),
        unsupported=("w4a16", "w4a4"),
        use="use null: the format of the engine",
        only_with=quantization_aware,
    )
    ignore_patterns: list[str] = key(
        list(names.QAT_IGNORED),
        "layers that are not rounded: a part of the name, or re: and a regular expression; the engine must not "
        "quantize them either (rollout.quantization_config_file)",
        only_with=quantization_aware,
    )
    mask_saturated: bool = key(
        False,
        "no gradient for numbers beyond the largest of their block's format, whose rounded value does not follow them",
        only_with=quantization_aware,
    )
    group_size: int = unsupported(16, "another group size; MX formats have groups of 32")
    activation_observer: str = unsupported("static_minmax", "calibrated scales; MX formats compute them for each token")
    quantization_config_path: str | None = unsupported(
        None, "a file for the trainer only", "use actor_rollout_ref.rollout.quantization_config_file"
    )


@dataclass
class ActorQatConfig(QatConfig):
    """Quantization-aware training of the policy, which the rollout samples from."""

    enable: str | bool = _enable_qat("auto")


@dataclass
class MixedPrecisionConfig(ConfigSection):
    """Dtypes of a model's computation and gradients."""

    param_dtype: str | None = key(
        None,
        "dtype of the computation; null: the value of `dtype`",
        choices=_DTYPES,
        unsupported=_FLOAT16,
        use="use float32 or bfloat16",
    )
    reduce_dtype: str | None = key(
        None,
        "dtype in which gradients are summed over the ranks; null: float32",
        choices=_DTYPES,
        unsupported=_FLOAT16,
        use="use float32 or bfloat16",
    )
    buffer_dtype: str | None = key(
        None,
        "dtype of the model's buffers, such as rotary frequencies, which are never rounded; null: float32",
        choices=("float32", "fp32"),
        unsupported=("bfloat16", "bf16", *_FLOAT16),
        use="use float32",
    )


_WITHOUT_POLICY = unless("offload_policy")


@dataclass
class FSDPConfig(ConfigSection):
    """Sharding of a model over the trainer's ranks with FSDP2."""

    model_dtype: str = key(
        "fp32",
        "dtype of the master weights and of the optimizer's state",
        choices=("fp32", "bf16", "float32", "bfloat16"),
    )
    dtype: str = key(
        "auto",
        "dtype of the computation; auto: bfloat16 if the device computes it fast, else float32; with "
        "quantization-aware training, the dtype of the rollout",
        choices=("auto", *_DTYPES),
        unsupported=_FLOAT16,
        use="use auto, float32 or bfloat16",
    )
    reshard_after_forward: bool = key(True, "free the gathered weights of a layer between forward and backward")
    qat: QatConfig = section(QatConfig, "quantization-aware training")
    fsdp_size: int = key(
        -1,
        "ranks that share one copy of the weights, such as the devices of a node; it must divide the ranks of the "
        "trainer. -1: all ranks share one copy",
        unit="ranks",
        at_least=-1,
    )
    param_offload: bool = key(
        False,
        "keep the weights in host memory while no pass, update or export uses them",
        only_with=(has_own_memory, _WITHOUT_POLICY),
    )
    optimizer_offload: bool = key(
        False,
        "keep the optimizer's state in host memory except in updates",
        only_with=(has_own_memory, _WITHOUT_POLICY),
    )
    offload_policy: bool = key(
        False,
        "keep weights, gradients and optimizer state in host memory all the time: each layer is copied to the device "
        "when it is gathered, and the CPU runs the optimizer",
        only_with=has_own_memory,
    )
    forward_prefetch: bool = key(
        False, "gather the weights of the next layer while a layer computes; more memory by one layer"
    )
    mixed_precision: MixedPrecisionConfig = section(MixedPrecisionConfig, "dtypes of computation and gradients")
    ulysses_sequence_parallel_size: int = key(
        1, "the same key of the section above it, which counts if it is above 1", unit="ranks", at_least=1
    )
    tensor_parallel_size: int = key(
        1,
        "neighboring ranks that share each decoder layer: they process the same samples, each with a part of the "
        "attention heads, of the MLP and of the experts. It must divide the ranks and these numbers of the model. Not "
        "supported for the critic",
        unit="ranks",
        at_least=1,
    )
    use_torch_compile: bool = without_effect(False, NO_TORCH_COMPILE)
    entropy_checkpointing: bool = without_effect(False, RECOMPUTED_ENTROPY)
    entropy_from_logits_with_chunking: bool = without_effect(False, CHUNKED_ENTROPY)

    @property
    def compute_dtype(self) -> str:
        """Value of `mixed_precision.param_dtype`, or else of `dtype`."""
        return self.mixed_precision.param_dtype or self.dtype


@dataclass
class ActorFSDPConfig(FSDPConfig):
    """Sharding of the policy over the trainer's ranks with FSDP2."""

    qat: ActorQatConfig = section(ActorQatConfig, "quantization-aware training")


@dataclass
class MegatronConfig(ConfigSection):
    """Keys of Megatron, which is not supported."""

    tensor_model_parallel_size: int = unsupported(1, "Megatron", _FSDP)
    pipeline_model_parallel_size: int = unsupported(1, "Megatron", _FSDP)
    virtual_pipeline_model_parallel_size: int | None = unsupported(None, "Megatron", _FSDP)
    expert_model_parallel_size: int = unsupported(1, "Megatron", _FSDP)
    expert_tensor_parallel_size: int | None = unsupported(None, "Megatron", _FSDP)
    context_parallel_size: int = unsupported(1, "Megatron", _FSDP)
    sequence_parallel: bool = unsupported(True, "Megatron", _FSDP)
    param_offload: bool = unsupported(False, "Megatron", _FSDP)
    grad_offload: bool = unsupported(False, "Megatron", _FSDP)
    optimizer_offload: bool = unsupported(False, "Megatron", _FSDP)
    use_mbridge: bool = unsupported(True, "Megatron", _FSDP)
    vanilla_mbridge: bool = unsupported(False, "Megatron", _FSDP)
    use_dist_checkpointing: bool = unsupported(False, "Megatron", _FSDP)
    dist_checkpointing_path: str | None = unsupported(None, "Megatron", _FSDP)
    override_transformer_config: dict[str, Any] = unsupported({}, "Megatron", _FSDP)
    override_ddp_config: dict[str, Any] = unsupported({}, "Megatron", _FSDP)


@dataclass
class CheckpointConfig(ConfigSection):
    """Parts of a checkpoint."""

    save_contents: list[str] = key(
        ["model", "optimizer", "extra"],
        "parts to save; hf_model adds the model in Hugging Face format",
        choices=names.CHECKPOINT_CONTENTS,
        only_with=when("trainer.save_freq", at_least=1, reason="without checkpoints (trainer.save_freq)"),
    )
    load_contents: list[str] | None = key(
        None,
        "parts to load when a run resumes, of which hf_model has no effect; null: save_contents",
        choices=names.CHECKPOINT_CONTENTS,
    )
    hf_dtype: str = key(
        "auto",
        "dtype of the weights in Hugging Face format; auto: the dtype of each weight in model.path",
        choices=("auto", "float32", "fp32", "bfloat16", "bf16"),
        only_with=when("save_contents", "hf_model", reason="without hf_model in checkpoint.save_contents"),
    )
    async_save: bool = unsupported(False, "saving in the background")

    @property
    def saved_parts(self) -> list[str]:
        """The parts to save from which a run can resume."""
        return [part for part in self.save_contents if part != _HF_MODEL]

    @property
    def loaded_parts(self) -> list[str]:
        """The parts to load when a run resumes."""
        contents = self.save_contents if self.load_contents is None else self.load_contents
        return [part for part in contents if part != _HF_MODEL]

    @property
    def saves_hf_model(self) -> bool:
        """True if a checkpoint also contains the model in Hugging Face format."""
        return _HF_MODEL in self.save_contents


@dataclass
class PolicyLossConfig(ConfigSection):
    """Choice of the policy loss, and its settings; docs/algorithms.md has the formulas."""

    loss_mode: str = key(
        "vanilla",
        "policy loss; vanilla: PPO's clipped loss",
        choices=tuple(names.POLICY_LOSSES),
        only_with=when("run.correction.bypass_mode", False, reason="in bypass mode"),
    )
    clip_cov_ratio: float = key(
        0.0002,
        "clip_cov: fraction of tokens that get no gradient",
        above=0,
        at_most=1,
        only_with=read_by_loss,
    )
    clip_cov_lb: float = key(
        1.0, "clip_cov: only tokens with a covariance above this lose their gradient", only_with=read_by_loss
    )
    clip_cov_ub: float = key(
        5.0, "clip_cov: only tokens with a covariance below this lose their gradient", only_with=read_by_loss
    )
    kl_cov_ratio: float = key(
        0.0002, "kl_cov: fraction of tokens with a KL penalty", above=0, at_most=1, only_with=read_by_loss
    )
    ppo_kl_coef: float = key(0.1, "kl_cov: weight of the KL penalty", at_least=0, only_with=read_by_loss)
    dro_beta: float | None = key(
        None, "dro: weight of the quadratic penalty; required with loss_mode=dro", above=0, only_with=read_by_loss
    )


_AGGREGATES = any_of(
    when("run.own_aggregation", False, words="a policy loss without its own aggregation"),
    unless("entropy_coeff", 0),
    when("use_kl_loss"),
    reason="{run.loss_choice}, which has its own aggregation",
)


@dataclass
class ActorConfig(ConfigSection):
    """Loss, optimizer, batches and sharding of the policy."""

    strategy: str = key(
        "fsdp",
        "training engine; fsdp and fsdp2 both mean FSDP2",
        choices=("fsdp", "fsdp2"),
        unsupported=names.UNSUPPORTED_ENGINES,
        use=_FSDP,
    )
    ppo_mini_batch_size: int = key(
        256, "prompts per optimizer step, with rollout.n samples each", unit="prompts", at_least=1
    )
    ppo_micro_batch_size_per_gpu: int | None = key(
        None,
        "samples per forward and backward pass of a rank",
        unit="samples",
        at_least=1,
        only_with=when("use_dynamic_bsz", False),
    )
    use_dynamic_bsz: bool = key(
        False,
        "fill each micro-batch with samples up to ppo_max_token_len_per_gpu tokens, instead of "
        "ppo_micro_batch_size_per_gpu samples",
    )
    ppo_max_token_len_per_gpu: int = key(
        16384,
        "tokens per forward and backward pass of a rank, including padding",
        unit="tokens",
        at_least=1,
        only_with=any_of(
            when("use_dynamic_bsz"),
            when("actor_rollout_ref.rollout.log_prob_use_dynamic_bsz"),
            when("actor_rollout_ref.ref.log_prob_use_dynamic_bsz"),
        ),
    )
    use_rollout_log_probs: bool = key(
        False,
        "no effect of its own; algorithm.rollout_correction.bypass_mode decides if old_log_probs are the rollout's",
    )
    ppo_epochs: int = key(1, "passes over the samples of a training step", at_least=1)
    clip_ratio: float = key(
        0.2,
        "PPO's clip range, for clip_ratio_low or clip_ratio_high if it is null",
        above=0,
        only_with=first_of(
            read_by_loss,
            any_of(
                when("run.user_loss", words="your own policy loss"),
                when("clip_ratio_low", None),
                when("clip_ratio_high", None),
                reason="with clip_ratio_low and clip_ratio_high set",
            ),
        ),
    )
    clip_ratio_low: float | None = key(
        0.2,
        "lower clip range: the ratio is clipped below 1 - clip_ratio_low, so a value from 1 up means no lower bound; "
        "dppo_*: bound of the divergence",
        above=0,
        only_with=read_by_loss,
    )
    clip_ratio_high: float | None = key(
        0.2,
        "upper clip range: the ratio is clipped above 1 + clip_ratio_high; dppo_*: bound of the divergence",
        above=0,
        only_with=read_by_loss,
    )
    clip_ratio_c: float = key(
        3.0,
        "dual clip: maximum ratio of tokens with a negative advantage; dppo_*: maximum ratio of all tokens",
        above=1,
        only_with=read_by_loss,
    )
    tau_pos: float = key(
        1.0, "sapo: sharpness of the gate for tokens with a positive advantage", above=0, only_with=read_by_loss
    )
    tau_neg: float = key(1.05, "sapo: sharpness of the gate for other tokens", above=0, only_with=read_by_loss)
    loss_agg_mode: str = key(
        "token-mean", "aggregation of token losses to a scalar", choices=names.LOSS_AGG_MODES, only_with=_AGGREGATES
    )
    loss_scale_factor: float | None = key(
        None,
        "divisor of loss_agg_mode=seq-mean-token-sum-norm; null: data.max_response_length",
        unit="tokens",
        above=0,
        only_with=first_of(_AGGREGATES, when("loss_agg_mode", "seq-mean-token-sum-norm")),
    )
    entropy_coeff: float = key(0.0, "weight of the entropy bonus in the loss")
    use_kl_loss: bool = key(False, "add the KL divergence from the reference model to the loss")
    kl_loss_coef: float = key(0.001, "weight of the KL loss", at_least=0, only_with=when("use_kl_loss"))
    kl_loss_type: str = key(
        "low_var_kl",
        "estimator of the KL loss; a name with + has the value of that estimator and the gradient of k2",
        choices=names.KL_TYPES,
        unsupported=names.UNSUPPORTED_KL_TYPES,
        use="use low_var_kl",
        only_with=when("use_kl_loss"),
    )
    old_log_probs_from_rollout: OldLogProbsConfig = section(
        OldLogProbsConfig,
        "reuse of the rollout's log-probabilities as old_log_probs, in steps in which a sample of them is right",
        only_with=when("actor_rollout_ref.actor.old_log_probs_from_rollout.enable"),
    )
    policy_loss: PolicyLossConfig = section(PolicyLossConfig, "choice of the policy loss, and its settings")
    optim: OptimConfig = section(OptimConfig, "AdamW and its learning rate schedule")
    fsdp_config: ActorFSDPConfig = section(ActorFSDPConfig, "sharding of the model over the trainer's ranks")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "parts of a checkpoint")
    profiler: RoleProfilerConfig = section(RoleProfilerConfig, "device profile of this role's stages")
    megatron: MegatronConfig = section(MegatronConfig, "Megatron: not supported")
    shuffle: bool = unsupported(False, "shuffled mini-batches")
    use_torch_compile: bool = without_effect(False, NO_TORCH_COMPILE)
    ulysses_sequence_parallel_size: int = key(
        1,
        "neighboring ranks that share the sequences of a micro-batch, for long sequences; they share its memory, and "
        "limits in tokens per rank apply to each one's part. It must divide the ranks and the model's query heads",
        unit="ranks",
        at_least=1,
    )
    entropy_checkpointing: bool = without_effect(False, RECOMPUTED_ENTROPY)
    entropy_from_logits_with_chunking: bool = without_effect(False, CHUNKED_ENTROPY)
    ppo_micro_batch_size: int | None = unsupported(
        None, "a micro-batch size over all ranks", "use ppo_micro_batch_size_per_gpu, which counts samples per rank"
    )
