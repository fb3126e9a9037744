"""The guard of a quantized rollout: it acts when the measured mismatch stays above its limit.

    each step: rollout_corr/k3_kl > max_k3_kl ?  no: the count starts again
                                                 yes, `steps` times in a row: stop, or correct from the next step on

Keys: `actor_rollout_ref.rollout.quantization_guard`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, TypedDict

from verl.config.quantization_guard import CORRECTION_PRESET, PREFIX, QuantizationGuardConfig
from verl.config.rollout_correction import Correction, RolloutCorrectionConfig, resolve
from verl.utils.quantization.encode_report import Errors, worst_errors

logger = logging.getLogger(__name__)

_K3_KL = "rollout_corr/k3_kl"
_WEIGHT_ERRORS = "weight_update/quantization_errors"
_SHOWN_LAYERS = 5
_CURES = (
    "Quantization-aware training removes the cause where it is off "
    "(actor_rollout_ref.actor.fsdp_config.qat.enable=True), and unquantized layers reduce it "
    "(actor_rollout_ref.rollout.quantization_config_file; `verl describe MODEL --budget` chooses them)"
)


class QuantizationGuardError(RuntimeError):
    """The mismatch of a quantized rollout stayed above the limit of `rollout.quantization_guard`."""


class GuardState(TypedDict):
    """The state of a guard in a checkpoint.

    Keys:
        steps_above: steps in a row above the limit.
        correcting: the guard has switched rollout correction on.
    """

    steps_above: int
    correcting: bool


class QuantizationGuard:
    """Counts the steps above the limit, and says what follows.

    Args:
        config: its section; `max_k3_kl` is set.

    Attributes:
        steps_above: steps in a row above the limit, up to now.
        correcting: True once rollout correction is on.
        error: with the action `stop`, the error that ends the run after a checkpoint.
    """

    def __init__(self, config: QuantizationGuardConfig):
        assert config.max_k3_kl is not None, "a guard has a limit"
        self._config, self._limit = config, config.max_k3_kl
        self.steps_above, self.correcting = 0, False
        self.error: QuantizationGuardError | None = None

    @property
    def state(self) -> GuardState:
        """The state for a checkpoint."""
        return {"steps_above": self.steps_above, "correcting": self.correcting}

    def restore(self, state: GuardState) -> None:
        """Continue from the state of an earlier run; a correction that it switched on needs the action `correct`."""
        self.steps_above = state["steps_above"]
        self.correcting = state["correcting"] and self._config.action == "correct"
        if state["correcting"] and not self.correcting:
            logger.warning(_CORRECTION_ENDS)

    def correction(self, configured: Correction) -> Correction:
        """Return the rollout correction of the next step."""
        return resolve(RolloutCorrectionConfig(preset=CORRECTION_PRESET)) if self.correcting else configured

    def observe(self, metrics: Mapping[str, Any]) -> bool:
        """Count a finished step; return True if `act` has to follow.

        Args:
            metrics: of the step; without `rollout_corr/k3_kl` (bypass mode in `critic_warmup`) the count stays.
        """
        if (k3_kl := metrics.get(_K3_KL)) is None:
            return False
        # NaN is above every limit.
        self.steps_above = 0 if k3_kl <= self._limit else self.steps_above + 1
        return self.steps_above >= self._config.steps and not self.correcting

    def act(self, step: int, metrics: Mapping[str, Any], outputs: Errors) -> None:
        """Switch the correction on, or set `error`.

        Args:
            step, metrics: the finished step.
            outputs: errors of the layers' outputs, the result of `Runtime.output_errors`.
        """
        found = (
            f"{PREFIX}max_k3_kl={self._limit:g}: {_K3_KL} was above it in {self.steps_above} steps in a row, and is "
            f"{metrics[_K3_KL]:.3g} in step {step}.\n{worst_layers(outputs, metrics.get(_WEIGHT_ERRORS))}\n{_CURES}."
        )
        if self._corrects:
            self.correcting = True
            logger.warning("%s Rollout correction (%s) is on from step %d on.", found, CORRECTION_PRESET, step + 1)
        else:
            self.error = QuantizationGuardError(
                f"{found} algorithm.rollout_correction.preset={CORRECTION_PRESET} corrects for the mismatch. To "
                f"go on without change, resume with a higher limit or {PREFIX}max_k3_kl=null"
            )

    def metrics(self) -> dict[str, float]:
        """Return the state after a step.

        Returns:
            `rollout_corr/guard_steps_above`; with the action `correct` also `rollout_corr/guard_correcting`, 1 if the
            correction is on from the next step on.
        """
        found = {"rollout_corr/guard_steps_above": float(self.steps_above)}
        return found | ({"rollout_corr/guard_correcting": float(self.correcting)} if self._corrects else {})

    @property
    def _corrects(self) -> bool:
        return self._config.action == "correct"


_CORRECTION_ENDS = (
    "the run that wrote the checkpoint had switched rollout correction on (quantization_guard.action=correct); this "
    f"run trains without it: to keep it, set algorithm.rollout_correction.preset={CORRECTION_PRESET}"
)


def restore_guard(guard: QuantizationGuard | None, state: GuardState | None) -> None:
    """Restore the guard of a resumed run; a warning tells if a correction that was on has no guard any more."""
    if state is None:
        return
    if guard is not None:
        guard.restore(state)
    elif state["correcting"]:
        logger.warning(_CORRECTION_ENDS)


def worst_layers(outputs: Errors, weights: Mapping[str, list[float | None]] | None = None) -> str:
    """Return a table of the layers in which the engine's numbers differ most.

    Args:
        outputs: errors of the layers' outputs; empty if they were not measured.
        weights: the result of `errors_by_depth` for the last weight update, shown instead; None if the engine rounds
            by itself.
    """
    if outputs:
        title, found = "errors in their outputs (relative to the output)", worst_errors(outputs, _SHOWN_LAYERS)
    elif weights:
        title = "rounding errors of their weights (relative to the weight)"
        named = [
            (error, f"layers.{depth}.{kind}" if len(of_layers) > 1 else kind)
            for kind, of_layers in weights.items()
            for depth, error in enumerate(of_layers)
            if error is not None
        ]
        found = sorted(named, key=lambda entry: math.inf if math.isnan(entry[0]) else entry[0], reverse=True)
    else:
        return "The errors of the layers are unknown, because the engine quantizes by itself."
    lines = [f"  {error:<8.3g} {name}" for error, name in found[:_SHOWN_LAYERS]]
    return "\n".join([f"The layers with the largest {title}:", *lines])
