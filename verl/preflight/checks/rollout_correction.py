"""`algorithm.rollout_correction` against the rollout, the loss and the estimator."""

from __future__ import annotations

from verl.config import names
from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.rollout_correction import PREFIX, Correction, resolve
from verl.preflight.findings import Findings

_ROLLOUT = "actor_rollout_ref.rollout."
_LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"


def check_rollout_correction(config: PPOConfig, found: Findings) -> None:
    """Its keys have to hold together, and the rest of the config has to allow what it asks for."""
    try:
        correction = resolve(config.algorithm.rollout_correction)
    except ConfigError as error:
        found.errors += error.problems
        return
    loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if correction.bypass_mode:
        _check_bypass(config, correction, found)
    elif loss_mode == "bypass_mode":
        found.errors.append(
            f"{_LOSS_MODE}=bypass_mode with {PREFIX}bypass_mode=False: that loss takes the rollout's log-probabilities "
            f"for the old ones; set {PREFIX}bypass_mode=True, which chooses it by itself"
        )
    elif (older := _older_tokens(config)) and not correction.active:
        found.warnings.append(
            f"{older} without a rollout correction: tokens of older weights are trained as if "
            f"the present ones had made them; set {PREFIX}rollout_is=token"
        )
    if correction.active or correction.bypass_mode:
        _check_log_probs(config, correction, found)


def _older_tokens(config: PPOConfig) -> str | None:
    """The key by which tokens of older weights are trained on."""
    if config.actor_rollout_ref.rollout.partial_rollout:
        return f"{_ROLLOUT}partial_rollout=True"
    return f"trainer.rollout_lag={config.trainer.rollout_lag}" if config.trainer.rollout_lag else None


def _check_bypass(config: PPOConfig, correction: Correction, found: Findings) -> None:
    bypass = f"{PREFIX}bypass_mode=True"
    algorithm, loss_mode = config.algorithm, config.actor_rollout_ref.actor.policy_loss.loss_mode
    if loss_mode not in ("vanilla", "bypass_mode"):
        found.errors.append(
            f"{_LOSS_MODE}={loss_mode} with {bypass}: bypass mode has a loss of its own, {PREFIX}loss_type="
            f"{correction.loss_type}; leave {_LOSS_MODE} at vanilla, or set {PREFIX}bypass_mode=False"
        )
    if algorithm.adv_estimator in names.SUM_PI_SQUARED_ESTIMATORS:
        found.errors.append(
            f"algorithm.adv_estimator={algorithm.adv_estimator} with {bypass}: it reads squared probabilities from the "
            f"forward pass that bypass mode leaves out; use another estimator, or {PREFIX}bypass_mode=False"
        )
    if algorithm.use_kl_in_reward:
        found.warnings.append(
            f"algorithm.use_kl_in_reward=True with {bypass}: the penalty compares the engine's log-probabilities with "
            "the reference model's, so that it also pays for the difference between engine and trainer; "
            "actor_rollout_ref.actor.use_kl_loss=True does not"
        )
    if correction.loss_type == "reinforce":
        if correction.rollout_is is not None and correction.rollout_is_batch_normalize:
            found.errors.append(
                f"{PREFIX}rollout_is_batch_normalize=True with {bypass} and {PREFIX}loss_type=reinforce: the weights "
                "are made in each micro-batch, which does not know the mean over the whole batch; set it to False, or "
                f"{PREFIX}bypass_mode=False"
            )
    elif correction.rollout_is is not None:
        found.notes.append(
            f"{PREFIX}rollout_is={correction.rollout_is}: only its metrics are computed, the ratio of "
            f"{PREFIX}loss_type=ppo_clip is the importance weight already"
        )


def _check_log_probs(config: PPOConfig, correction: Correction, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    asked = f"{PREFIX}bypass_mode=True" if correction.bypass_mode else f"{PREFIX}rollout_is or {PREFIX}rollout_rs"
    if not rollout.calculate_log_probs:
        found.errors.append(
            f"{_ROLLOUT}calculate_log_probs=False: {asked} needs the log-probabilities of the engine; set it to True"
        )
        return
    cut = [f"{_ROLLOUT}top_p={rollout.top_p}"] if rollout.top_p != 1 else []
    cut += [f"{_ROLLOUT}top_k={rollout.top_k}"] if rollout.top_k not in (-1, 0) else []
    mode = (rollout.engine_kwargs.get("vllm") or {}).get("logprobs_mode", rollout.logprobs_mode)
    if mode.startswith("raw"):
        changed = [f"{_ROLLOUT}temperature={rollout.temperature}"] if rollout.temperature != 1 else []
        if changed + cut:
            found.warnings.append(
                f"{_ROLLOUT}logprobs_mode={mode} with {', '.join(changed + cut)}: the engine returns log-probabilities "
                f"of another distribution than it samples from, so that ratios and weights are wrong; use "
                f"{_ROLLOUT}logprobs_mode=processed_logprobs"
            )
    elif cut:
        found.warnings.append(
            f"{', '.join(cut)} with {asked}: the engine samples from the likeliest tokens alone, the trainer knows all "
            "of them, so that ratios are below 1 by the probability that was cut off and narrow bands reject much; use "
            f"{_ROLLOUT}top_p=1 and {_ROLLOUT}top_k=-1"
        )
