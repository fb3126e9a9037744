"""`critic`: the value model of PPO, known and not supported yet."""

# ruff: noqa: RUF009  (key, planned and section make dataclass fields)
from __future__ import annotations

from dataclasses import dataclass

from verl.trainer.config.schema import planned, section

_GRPO = "leave critic.* out and use algorithm.adv_estimator=grpo, which needs no critic"


@dataclass
class CriticOptimConfig:
    """Its optimizer."""

    lr: float = planned(1e-5, "a critic", _GRPO)
    lr_warmup_steps: int = planned(-1, "a critic", _GRPO)
    lr_warmup_steps_ratio: float = planned(0.0, "a critic", _GRPO)
    weight_decay: float = planned(0.01, "a critic", _GRPO)


@dataclass
class CriticFSDPConfig:
    """Its sharding."""

    param_offload: bool = planned(False, "a critic", _GRPO)
    optimizer_offload: bool = planned(False, "a critic", _GRPO)
    fsdp_size: int = planned(-1, "a critic", _GRPO)


@dataclass
class CriticModelConfig:
    """Its model."""

    path: str | None = planned(None, "a critic", _GRPO)
    use_remove_padding: bool = planned(True, "a critic", _GRPO)
    enable_gradient_checkpointing: bool = planned(True, "a critic", _GRPO)


@dataclass
class CriticConfig:
    """The value model of PPO."""

    enable: bool | None = planned(None, "a critic", _GRPO)
    strategy: str | None = planned(None, "a critic", _GRPO)
    ppo_mini_batch_size: int | None = planned(None, "a critic", _GRPO)
    ppo_micro_batch_size_per_gpu: int | None = planned(None, "a critic", _GRPO)
    ppo_max_token_len_per_gpu: int = planned(32768, "a critic", _GRPO)
    forward_micro_batch_size_per_gpu: int | None = planned(None, "a critic", _GRPO)
    use_dynamic_bsz: bool | None = planned(None, "a critic", _GRPO)
    cliprange_value: float = planned(0.5, "a critic", _GRPO)
    ulysses_sequence_parallel_size: int = planned(1, "a critic", _GRPO)
    optim: CriticOptimConfig = section(CriticOptimConfig, "its optimizer")
    fsdp: CriticFSDPConfig = section(CriticFSDPConfig, "its sharding")
    model: CriticModelConfig = section(CriticModelConfig, "its model")
