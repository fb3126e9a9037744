"""The policy loss against its own settings."""

from __future__ import annotations

from verl.config.actor import ActorConfig
from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.preflight.findings import Findings

_ACTOR = "actor_rollout_ref.actor"
_LOSS = f"{_ACTOR}.policy_loss"
# What docs/algorithms.md gives for losses whose bounds are of another kind than PPO's ratio.
_ADVISED = {
    "gspo": "clip_ratio_low=3e-4 and clip_ratio_high=4e-4 (of a sequence's mean ratio)",
    "dppo_tv": "clip_ratio_low=0.15, clip_ratio_high=0.15 (of a divergence) and a clip_ratio_c of 20 or more",
    "dppo_kl": "clip_ratio_low=0.15, clip_ratio_high=0.15 (of a divergence) and a clip_ratio_c of 20 or more",
}
_RATIO_CLIPPED = ("vanilla", "gspo", "clip_cov")


def check_policy_loss(config: PPOConfig, found: Findings) -> None:
    """What a loss needs has to be set, and its bounds have to leave room."""
    actor = config.actor_rollout_ref.actor
    settings = actor.policy_loss
    if settings.loss_mode == "dro" and settings.dro_beta is None:
        found.errors.append(f"{_LOSS}.dro_beta is not set: loss_mode=dro has no default for it; set it, e.g. to 0.05")
    if settings.loss_mode == "clip_cov" and settings.clip_cov_lb >= settings.clip_cov_ub:
        found.errors.append(
            f"{_LOSS}.clip_cov_lb={show(settings.clip_cov_lb)}: no covariance lies between it and "
            f"clip_cov_ub={show(settings.clip_cov_ub)}; use a smaller one"
        )
    low = actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low
    high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high
    ppo = ActorConfig()
    if settings.loss_mode in _ADVISED and (low, high) == (ppo.clip_ratio_low, ppo.clip_ratio_high):
        found.warnings.append(
            f"{_ACTOR}.clip_ratio_low={show(low)}, clip_ratio_high={show(high)} with {_LOSS}.loss_mode="
            f"{settings.loss_mode}: these are PPO's; its paper has {_ADVISED[settings.loss_mode]}"
        )
    if settings.loss_mode in _RATIO_CLIPPED and low > 1:
        found.warnings.append(
            f"{_ACTOR}.clip_ratio_low={show(low)}: the ratio is then never clipped from below, since it is above 0; "
            "usual values are far below 1"
        )
