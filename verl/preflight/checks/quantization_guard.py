"""Checks of `rollout.quantization_guard`: the run must measure the mismatch, and the action must be possible."""

from __future__ import annotations

from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.quantization_guard import CORRECTION_PRESET, PREFIX
from verl.config.rollout_correction import PREFIX as CORRECTION
from verl.config.rollout_correction import resolve
from verl.preflight.checks.rollout_correction import check_sampled_distribution, stale_tokens_key
from verl.preflight.findings import Findings

_ROLLOUT = "actor_rollout_ref.rollout."


def check_quantization_guard(config: PPOConfig, found: Findings) -> None:
    """Check that a guard has something to measure, and that its action is possible in this run."""
    rollout = config.actor_rollout_ref.rollout
    guard = rollout.quantization_guard
    if guard.max_k3_kl is None:
        return
    limit = f"{PREFIX}max_k3_kl={guard.max_k3_kl:g}"
    if rollout.quantization is None:
        found.errors.append(
            f"{limit}: the rollout is not quantized, so there is nothing to guard; set {_ROLLOUT}quantization, or "
            f"{PREFIX}max_k3_kl=null"
        )
        return
    if not rollout.calculate_log_probs:
        found.errors.append(
            f"{_ROLLOUT}calculate_log_probs=False with {limit}: the mismatch is measured with the log-probabilities of "
            "the engine; set it to True"
        )
        return
    if stale := stale_tokens_key(config):
        found.warnings.append(
            f"{limit} with {stale}: tokens from older weights add to the mismatch, so it is not that of the "
            "quantization alone; choose a higher limit"
        )
    if guard.action == "correct":
        _check_correct(config, found)
    elif config.trainer.save_freq <= 0:
        found.warnings.append(
            f"{PREFIX}action=stop with trainer.save_freq={config.trainer.save_freq}: the run would stop without a "
            "checkpoint; set trainer.save_freq"
        )


def _check_correct(config: PPOConfig, found: Findings) -> None:
    """Check that the run can switch rollout correction on."""
    field = f"{PREFIX}action=correct"
    try:
        correction = resolve(config.algorithm.rollout_correction)
    except ConfigError:
        return  # check_rollout_correction reports it
    if correction.bypass_mode:
        found.errors.append(
            f"{field} with {CORRECTION}bypass_mode=True: bypass mode trains with a loss of its own, which weights "
            f"of {CORRECTION_PRESET} do not reach; use {PREFIX}action=stop, or {CORRECTION}bypass_mode=False"
        )
    elif correction.active:
        found.errors.append(
            f"{field}: rollout correction is on from the start ({CORRECTION}rollout_is or rollout_rs); use "
            f"{PREFIX}action=stop, or {CORRECTION}preset=null without rollout_is and rollout_rs"
        )
    else:
        check_sampled_distribution(config, field, found)
