"""Quantization-aware training: the mode that the keys of a run select. The keys are in verl.config.actor."""

from __future__ import annotations

from verl.config.actor import FSDPConfig
from verl.config.rollout import RolloutConfig
from verl.utils.dtypes import DtypeChoice, choose_dtype
from verl.utils.quantization.schemes import weight_format_class

AS_ENGINE = "as the engine"


def qat_mode(fsdp: FSDPConfig, rollout: RolloutConfig) -> str | None:
    """Return the mode of a model that computes with numbers of the quantized engine; None if it does not.

    Returns:
        `fsdp.qat.mode`, or `AS_ENGINE` for null.
    """
    enable = fsdp.qat.enable
    if enable == "auto":
        enable = weight_format_class(rollout.quantization).supports_qat
    return (fsdp.qat.mode or AS_ENGINE) if enable else None


def policy_dtype(device: str, fsdp: FSDPConfig, rollout: RolloutConfig) -> DtypeChoice:
    """Return the dtype in which the policy or its reference model computes.

    With quantization-aware training, `auto` is the engine's dtype, because the engine rounds to it before it quantizes.

    Args:
        device: `cpu`, `cuda` or `npu`.
    """
    if fsdp.compute_dtype == "auto" and qat_mode(fsdp, rollout) is not None:
        return DtypeChoice(choose_dtype(device, rollout.dtype).name, "auto: the rollout's, which it rounds to first")
    return choose_dtype(device, fsdp.compute_dtype)
