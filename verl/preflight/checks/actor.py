"""Checks of `actor_rollout_ref.actor` and `.ref`: batch sizes and the policy loss."""

from __future__ import annotations

from verl.config import names
from verl.config.actor import ActorConfig
from verl.config.ppo import PPOConfig
from verl.config.rank_groups import actor_ranks_per_sample
from verl.config.roles import needs_ref
from verl.config.schema import show
from verl.config.sequence_parallel import actor_sequence_parallel, ref_sequence_parallel
from verl.preflight.batch_sizes import check_division, check_log_prob_limit, check_micro_batch_limit, longest_sample
from verl.preflight.findings import Findings

_ACTOR = "actor_rollout_ref.actor"
_LOSS = f"{_ACTOR}.policy_loss"


def check_actor(config: PPOConfig, found: Findings) -> None:
    """Check the batch sizes of actor and reference model, and the settings of the policy loss."""
    _check_batches(config, found)
    _check_policy_loss(config.actor_rollout_ref.actor, found)


def _check_batches(config: PPOConfig, found: Findings) -> None:
    actor, ref, longest = config.actor_rollout_ref.actor, config.actor_rollout_ref.ref, longest_sample(config)
    shared = actor_sequence_parallel(actor)
    micro = (f"{_ACTOR}.ppo_micro_batch_size_per_gpu", actor.ppo_micro_batch_size_per_gpu)
    check_division(
        (f"{_ACTOR}.ppo_mini_batch_size", actor.ppo_mini_batch_size),
        (micro[0], None if actor.use_dynamic_bsz else micro[1]),
        actor_ranks_per_sample(actor),
        config,
        found,
    )
    check_micro_batch_limit(
        (f"{_ACTOR}.use_dynamic_bsz", actor.use_dynamic_bsz),
        micro,
        (f"{_ACTOR}.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
        longest,
        shared,
        found,
    )
    if needs_ref(config):
        check_log_prob_limit("ref", ref, actor, longest, ref_sequence_parallel(ref, actor), found)


def _check_policy_loss(actor: ActorConfig, found: Findings) -> None:
    settings = actor.policy_loss
    if settings.loss_mode == "dro" and settings.dro_beta is None:
        found.errors.append(
            f"{_LOSS}.dro_beta is not set: loss_mode=dro needs it, and it has no default; set it, e.g. to 0.05"
        )
    if settings.loss_mode == "clip_cov" and settings.clip_cov_lb >= settings.clip_cov_ub:
        found.errors.append(
            f"{_LOSS}.clip_cov_lb={show(settings.clip_cov_lb)}: must be below "
            f"clip_cov_ub={show(settings.clip_cov_ub)}; use a smaller value"
        )
    low = actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low
    high = actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high
    ppo = ActorConfig()
    loss = names.POLICY_LOSSES.get(settings.loss_mode, names.PolicyLoss())
    if loss.paper_clip_range and (low, high) == (ppo.clip_ratio_low, ppo.clip_ratio_high):
        found.warnings.append(
            f"{_ACTOR}.clip_ratio_low={show(low)}, clip_ratio_high={show(high)} with {_LOSS}.loss_mode="
            f"{settings.loss_mode}: these are PPO's bounds; use those of this loss's paper: "
            f"{loss.paper_clip_range}"
        )
    if loss.clips_ratio and low > 1:
        found.warnings.append(
            f"{_ACTOR}.clip_ratio_low={show(low)}: the ratio is always above 0, so a value above 1 never clips it from "
            "below; usual values are far below 1"
        )
