"""Quantization-aware training: the mode that the keys of a run select. The keys are in verl.config.actor."""

from __future__ import annotations

from verl.config.actor import FSDPConfig
from verl.config.rollout import RolloutConfig
from verl.utils.quantization.schemes import weight_format_class


def qat_mode(fsdp: FSDPConfig, rollout: RolloutConfig) -> str | None:
    """Return the mode of a model that computes with numbers of the quantized engine; None if it does not.

    Returns:
        `fsdp.qat.mode`, with null resolved to the mode that computes as the engine.
    """
    modes = weight_format_class(rollout.quantization).qat_modes
    if not fsdp.qat.enable or (fsdp.qat.enable == "auto" and not modes):
        return None
    # Without a format the run is refused before it starts.
    return fsdp.qat.mode or (modes[0] if modes else "")
