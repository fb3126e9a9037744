"""Checks of `algorithm.rollout_correction` against the rollout, the loss and the estimator."""

from __future__ import annotations

from verl.config import names
from verl.config.errors import ConfigError
from verl.config.ppo import PPOConfig
from verl.config.rollout import RolloutConfig
from verl.config.rollout_correction import PREFIX, Correction, resolve
from verl.config.stream import carries_prompts, carrying_key
from verl.preflight.findings import Findings

_ROLLOUT = "actor_rollout_ref.rollout."
_LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
_BYPASS = f"{PREFIX}bypass_mode=True"


def check_rollout_correction(config: PPOConfig, found: Findings) -> None:
    """Check that the keys are consistent, and that the rest of the config allows the correction."""
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
            f"{_LOSS_MODE}=bypass_mode with {PREFIX}bypass_mode=False: this loss uses the rollout's log-probabilities "
            f"as the old ones; set {_BYPASS}, which selects this loss automatically"
        )
    elif (stale := stale_tokens_key(config)) and not correction.active:
        found.warnings.append(
            f"{stale} without a rollout correction: tokens from older weights are trained as if the current weights "
            f"had generated them; set {PREFIX}rollout_is=token"
        )
    rollout = config.actor_rollout_ref.rollout
    if correction.active or correction.bypass_mode:
        _check_log_probs(config, correction, found)
    elif (cut := _truncation(rollout)) and not rollout.replay_sampling_mask:
        found.notes.append(
            f"{', '.join(cut)}: the engine samples from the most likely tokens only, but the trainer's probabilities "
            f"cover all tokens, so the policy that is trained is not the one that generates; set "
            f"{_ROLLOUT}replay_sampling_mask=True to train the one that generates"
        )


def stale_tokens_key(config: PPOConfig) -> str | None:
    """Return key and value by which the run trains on tokens of older weights, or None."""
    if carries_prompts(config):
        return carrying_key(config)
    return f"trainer.rollout_lag={config.trainer.rollout_lag}" if config.trainer.rollout_lag else None


def _truncation(rollout: RolloutConfig) -> list[str]:
    """Return keys and values by which the engine samples from a part of the vocabulary."""
    keys = [f"{_ROLLOUT}top_p={rollout.top_p}"] if rollout.top_p != 1 else []
    return keys + ([f"{_ROLLOUT}top_k={rollout.top_k}"] if rollout.top_k not in (-1, 0) else [])


def _check_bypass(config: PPOConfig, correction: Correction, found: Findings) -> None:
    algorithm, loss_mode = config.algorithm, config.actor_rollout_ref.actor.policy_loss.loss_mode
    if loss_mode not in ("vanilla", "bypass_mode"):
        found.errors.append(
            f"{_LOSS_MODE}={loss_mode} with {_BYPASS}: bypass mode uses {PREFIX}loss_type={correction.loss_type} as "
            f"its loss; leave {_LOSS_MODE} at vanilla, or set {PREFIX}bypass_mode=False"
        )
    if algorithm.adv_estimator in names.SUM_PI_SQUARED_ESTIMATORS:
        found.errors.append(
            f"algorithm.adv_estimator={algorithm.adv_estimator} with {_BYPASS}: it needs the sums of squared "
            "probabilities from the forward pass that bypass mode skips; use another estimator, or "
            f"{PREFIX}bypass_mode=False"
        )
    if algorithm.use_kl_in_reward:
        found.warnings.append(
            f"algorithm.use_kl_in_reward=True with {_BYPASS}: the penalty compares the engine's log-probabilities with "
            "the reference model's, so it also penalizes the numerical difference between engine and trainer; use "
            "actor_rollout_ref.actor.use_kl_loss=True to avoid this"
        )
    if correction.loss_type == "reinforce":
        if correction.rollout_is is not None and correction.rollout_is_batch_normalize:
            found.errors.append(
                f"{PREFIX}rollout_is_batch_normalize=True with {_BYPASS} and {PREFIX}loss_type=reinforce: the weights "
                "are computed in each micro-batch, without the mean over the whole batch; set it to False, or "
                f"{PREFIX}bypass_mode=False"
            )
    elif correction.rollout_is is not None:
        found.notes.append(
            f"{PREFIX}rollout_is={correction.rollout_is}: only its metrics are computed, because the ratio of "
            f"{PREFIX}loss_type=ppo_clip already is the importance weight"
        )


def _check_log_probs(config: PPOConfig, correction: Correction, found: Findings) -> None:
    """Check that the engine returns log-probabilities of the distribution that it samples from."""
    user = _BYPASS if correction.bypass_mode else f"{PREFIX}rollout_is or {PREFIX}rollout_rs"
    if config.actor_rollout_ref.rollout.calculate_log_probs:
        check_sampled_distribution(config, user, found)
        return
    found.errors.append(
        f"{_ROLLOUT}calculate_log_probs=False: {user} needs the log-probabilities of the engine; set it to True"
    )


def check_sampled_distribution(config: PPOConfig, user: str, found: Findings) -> None:
    """Warn if engine and trainer compute log-probabilities of different distributions.

    Args:
        user: the keys that compare the two.
    """
    rollout = config.actor_rollout_ref.rollout
    cut = _truncation(rollout)
    mode = (rollout.engine_kwargs.get("vllm") or {}).get("logprobs_mode", rollout.logprobs_mode)
    if mode.startswith("raw"):
        changed = [f"{_ROLLOUT}temperature={rollout.temperature}"] if rollout.temperature != 1 else []
        if changed + cut:
            found.warnings.append(
                f"{_ROLLOUT}logprobs_mode={mode} with {', '.join(changed + cut)}: the engine samples from one "
                "distribution and returns log-probabilities of another, so ratios and weights are wrong; use "
                f"{_ROLLOUT}logprobs_mode=processed_logprobs"
            )
    elif cut and not rollout.replay_sampling_mask:
        found.warnings.append(
            f"{', '.join(cut)} with {user}: the engine samples from the most likely tokens only, but the trainer's "
            "probabilities cover all tokens, so ratios are below 1 by the probability that is cut off, and narrow "
            f"bands reject many tokens; set {_ROLLOUT}replay_sampling_mask=True, or {_ROLLOUT}top_p=1 and "
            f"{_ROLLOUT}top_k=-1"
        )
