"""Quantization-aware training: the mode that the keys of a run select. The keys are in verl.config.actor."""

from __future__ import annotations

from verl.config.actor import FSDPConfig
from verl.config.rollout import RolloutConfig
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
