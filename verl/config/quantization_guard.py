"""`actor_rollout_ref.rollout.quantization_guard`: a limit of the mismatch that a quantized rollout may have."""

from __future__ import annotations

from dataclasses import dataclass

from verl.config.schema import ConfigSection, key

PREFIX = "actor_rollout_ref.rollout.quantization_guard."
CORRECTION_PRESET = "decoupled_token_is"
"""Preset of `algorithm.rollout_correction` that the action `correct` switches on."""


@dataclass
class QuantizationGuardConfig(ConfigSection):
    """Limit of the mismatch between a quantized rollout and the trainer, and the action if it is exceeded."""

    max_k3_kl: float | None = key(
        None,
        "maximum of rollout_corr/k3_kl, the KL divergence between rollout and trainer, in nats per token; null: no "
        "limit",
        above=0,
    )
    steps: int = key(
        3, "the action follows after this number of steps in a row above the limit", unit="training steps", at_least=1
    )
    action: str = key(
        "stop",
        "stop: write a checkpoint, then end the run with an error; correct: switch rollout correction on from the next "
        f"step on (algorithm.rollout_correction.preset={CORRECTION_PRESET})",
        choices=("stop", "correct"),
        unsupported=("raise_precision",),
        use="an engine creates each layer in its format at the start and cannot hold a quantized layer in BF16 later; "
        "use stop, choose the layers to leave out with `verl describe MODEL --budget`, which writes a "
        "quantization_config_file, and resume with it",
    )
