"""Checks of `fsdp_config.qat`: the trainer may only round what the engine rounds, and must reach all of it."""

from __future__ import annotations

import re
from collections.abc import Iterable

from verl.config import names
from verl.config.actor import FSDPConfig
from verl.config.ppo import PPOConfig
from verl.config.qat import policy_dtype, qat_mode
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.dtypes import choose_dtype
from verl.utils.quantization.ascend_layers import Layer
from verl.utils.quantization.schemes import SCHEME_NAMES, WeightFormat, weight_format_class
from verl.utils.quantization.schemes.ascend import AscendFormat
from verl.utils.quantization.schemes.base import ScaledFormat

_ROLLOUT = "actor_rollout_ref.rollout"


def check_qat(config: PPOConfig, device: str | None, quantization: WeightFormat | None, found: Findings) -> None:
    """Check quantization-aware training of the policy and of the reference model; the critic has none.

    Args:
        device: `cpu`, `cuda` or `npu`; None if it is not known.
        quantization: the engine's format of quantized weights; None if there is none or if it could not be checked.
    """
    if config.critic.fsdp.qat.enable is True:
        found.errors.append(
            "critic.fsdp.qat.enable=True: no engine computes values, so the critic is not rounded; use False"
        )
    roles = config.actor_rollout_ref
    for field, fsdp in (("actor.fsdp_config", roles.actor.fsdp_config), ("ref.fsdp_config", roles.ref.fsdp_config)):
        field = f"actor_rollout_ref.{field}"
        mode = qat_mode(fsdp, roles.rollout)
        if mode is None:
            continue
        if not weight_format_class(roles.rollout.quantization).supports_qat:
            found.errors.append(
                f"{field}.qat.enable=True: {_ROLLOUT}.quantization={show(roles.rollout.quantization)} has no numbers "
                f"to train on; set {_ROLLOUT}.quantization={_with_qat()}, or {field}.qat.enable=False"
            )
            continue
        if device is not None:
            _check_dtypes(config, field, fsdp, device, found)
        if isinstance(quantization, AscendFormat) and mode in names.QAT_MODES:
            _check_mode(f"{field}.qat.mode={mode}", names.QAT_MODES[mode], quantization.description.schemes, found)
        if isinstance(quantization, ScaledFormat):
            _check_patterns(f"{field}.qat.ignore_patterns", fsdp.qat.ignore_patterns, quantization.layers, found)


def _with_qat() -> str:
    return " or ".join(name for name in SCHEME_NAMES if weight_format_class(name).supports_qat)


def _check_mode(field: str, scheme: str, schemes: Iterable[str], found: Findings) -> None:
    others = sorted(set(schemes) - {scheme})
    if others:
        found.errors.append(
            f"{field}: the engine holds layers in {' and '.join(others)}; use null, which computes as the engine does"
        )


def _check_dtypes(config: PPOConfig, field: str, fsdp: FSDPConfig, device: str, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    trainer, engine = policy_dtype(device, fsdp, rollout).name, choose_dtype(device, rollout.dtype).name
    if trainer != engine:
        found.errors.append(
            f"{field}.dtype={fsdp.compute_dtype} with qat.enable={show(fsdp.qat.enable)}: the trainer would compute in "
            f"{trainer}, but the engine rounds to {engine} before it quantizes ({_ROLLOUT}.dtype={rollout.dtype}); use "
            f"the same dtype for both, or {field}.qat.enable=False"
        )


def _check_patterns(field: str, patterns: Iterable[str], layers: Iterable[Layer], found: Findings) -> None:
    """Check that each pattern matches a layer, and none that the engine quantizes."""
    layers = list(layers)
    for pattern in patterns:
        try:
            matched = [layer for layer in layers if _matches(layer.name, pattern)]
        except re.error as error:
            found.errors.append(f"{field}: {pattern!r} is not a regular expression: {error}; correct it")
            continue
        quantized = next((layer.name for layer in matched if layer.quantized), None)
        if quantized is not None:
            found.errors.append(
                f"{field}: {pattern!r} matches {quantized}, which the engine quantizes; remove the pattern, or leave "
                f"the layer out of both ({_ROLLOUT}.quantization_config_file)"
            )
        elif not matched and pattern not in names.QAT_IGNORED:
            found.errors.append(f"{field}: {pattern!r} matches no layer of the model; remove it, or correct it")


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern matches, by the rules of upstream verl."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in name
