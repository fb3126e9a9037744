"""Checks of `actor.old_log_probs_from_rollout`: engine and trainer must compute the same, and nobody needs the pass."""

from __future__ import annotations

from verl.config import names
from verl.config.errors import ConfigError
from verl.config.old_log_probs import PREFIX
from verl.config.ppo import PPOConfig
from verl.config.qat import qat_mode
from verl.config.quantization_guard import PREFIX as GUARD
from verl.config.rollout_correction import PREFIX as CORRECTION
from verl.config.rollout_correction import resolve
from verl.config.schema import show
from verl.preflight.findings import Findings
from verl.utils.quantization.schemes import weight_format_class

_ENABLE = f"{PREFIX}enable"
_ROLLOUT = "actor_rollout_ref.rollout."
_QAT = "actor_rollout_ref.actor.fsdp_config.qat."


def check_old_log_probs(config: PPOConfig, found: Findings) -> None:
    """Check that the rollout's log-probabilities may replace the trainer's in this run."""
    if config.actor_rollout_ref.actor.old_log_probs_from_rollout.enable:
        reasons = [*_other_policy(config), *_other_distribution(config), *_all_values_needed(config)]
        found.errors += [f"{_ENABLE}=True with {reason}, or {_ENABLE}=False" for reason in reasons]


def _other_policy(config: PPOConfig) -> list[str]:
    """Return why the engine computes another policy than the trainer, or returns no values."""
    roles, reasons = config.actor_rollout_ref, []
    rollout = roles.rollout
    if not rollout.calculate_log_probs:
        reasons.append(f"{_ROLLOUT}calculate_log_probs=False: the engine returns no values; set it to True")
    if config.trainer.rollout_lag:
        reasons.append(
            f"trainer.rollout_lag={config.trainer.rollout_lag}: older weights generate every sample, so none could be "
            "reused; use trainer.rollout_lag=0"
        )
    if config.async_training.enable:
        reasons.append(
            "async_training.enable=True: older weights generate many samples, and its bypass mode takes all values of "
            "the rollout; leave this out"
        )
    if rollout.quantization is not None:
        mode, field = qat_mode(roles.actor.fsdp_config, rollout), f"{_ROLLOUT}quantization={rollout.quantization}"
        if not weight_format_class(rollout.quantization).supports_qat:
            reasons.append(f"{field}: the engine samples from another policy than the trained one; use null")
        elif mode is None:
            reasons.append(
                f"{field} and {_QAT}enable={show(roles.actor.fsdp_config.qat.enable)}: the engine samples from another "
                f"policy than the trained one; set {_QAT}enable=True"
            )
        elif mode == names.QAT_WEIGHTS_ONLY:
            reasons.append(f"{_QAT}mode={mode}: only the engine rounds the inputs of its layers; use null")
    return reasons


def _other_distribution(config: PPOConfig) -> list[str]:
    """Return why the values of the engine belong to another distribution than those of the trainer."""
    rollout, reasons = config.actor_rollout_ref.rollout, []
    mode = (rollout.engine_kwargs.get("vllm") or {}).get("logprobs_mode", rollout.logprobs_mode)
    if mode != "processed_logprobs" and (mode != "raw_logprobs" or rollout.temperature != 1):
        reasons.append(
            f"{_ROLLOUT}logprobs_mode={mode} and {_ROLLOUT}temperature={rollout.temperature:g}: the trainer divides "
            f"the logits by the temperature, and these values do not; use {_ROLLOUT}logprobs_mode=processed_logprobs"
        )
    for name, value, off in (("top_p", rollout.top_p, (1,)), ("top_k", rollout.top_k, (-1, 0))):
        if value not in off and not rollout.replay_sampling_mask:
            reasons.append(
                f"{_ROLLOUT}{name}={value}: the engine's values are those of a part of the tokens, the trainer's those "
                f"of all tokens; use {_ROLLOUT}{name}={off[0]}, or {_ROLLOUT}replay_sampling_mask=True"
            )
    return reasons


def _all_values_needed(config: PPOConfig) -> list[str]:
    """Return who else needs the trainer's values of all samples."""
    algorithm, reasons = config.algorithm, []
    try:
        correction = resolve(algorithm.rollout_correction)
    except ConfigError:
        return []  # check_rollout_correction reports it
    if correction.bypass_mode:
        reasons.append(
            f"{CORRECTION}bypass_mode=True: bypass mode takes all values from the rollout without a check; use one of "
            "the two"
        )
    elif correction.active:
        reasons.append(
            f"{CORRECTION}rollout_is or rollout_rs: the correction compares the trainer's values of every sample with "
            f"the rollout's; use {CORRECTION}preset=null without rollout_is and rollout_rs"
        )
    guard = config.actor_rollout_ref.rollout.quantization_guard
    if guard.max_k3_kl is not None and guard.action == "correct":
        reasons.append(
            f"{GUARD}action=correct: the correction would compare the trainer's values of every sample with the "
            f"rollout's; use {GUARD}action=stop"
        )
    if algorithm.use_kl_in_reward:
        reasons.append(
            "algorithm.use_kl_in_reward=True: the penalty would contain the numerical difference between engine and "
            "trainer; use actor_rollout_ref.actor.use_kl_loss=True"
        )
    if algorithm.adv_estimator in names.SUM_PI_SQUARED_ESTIMATORS:
        reasons.append(
            f"algorithm.adv_estimator={algorithm.adv_estimator}: it needs the sums of squared probabilities from the "
            "forward pass; use another estimator"
        )
    return reasons
