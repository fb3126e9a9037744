"""Rules about the whole config: which models a run has, and the critic's values that default to the actor's."""

from __future__ import annotations

import dataclasses

from verl.config import names
from verl.config.critic import CriticConfig
from verl.config.ppo import PPOConfig

# Keys of the critic whose null means the actor's value.
_FROM_ACTOR = (
    "ppo_mini_batch_size",
    "ppo_micro_batch_size_per_gpu",
    "use_dynamic_bsz",
    "ppo_epochs",
    "loss_agg_mode",
    "strategy",
)


def needs_ref(config: PPOConfig) -> bool:
    """Return True if the run holds a reference model."""
    return config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward


def needs_critic(config: PPOConfig) -> bool:
    """Return True if the run trains a critic: `critic.enable`, or if that is null, if the estimator reads values."""
    enable = config.critic.enable
    return config.algorithm.adv_estimator in names.CRITIC_ESTIMATORS if enable is None else enable


def resolve_critic(config: PPOConfig) -> CriticConfig:
    """Return a copy of the `critic` section in which null values are replaced.

    The values come from the actor and the policy's model. The forward limits take the critic's own training limits.
    """
    critic, actor, policy = config.critic, config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    resolved = dataclasses.replace(critic, model=dataclasses.replace(critic.model))
    for name in _FROM_ACTOR:
        if getattr(critic, name) is None:
            setattr(resolved, name, getattr(actor, name))
    if resolved.forward_micro_batch_size_per_gpu is None:
        resolved.forward_micro_batch_size_per_gpu = resolved.ppo_micro_batch_size_per_gpu
    if resolved.forward_max_token_len_per_gpu is None:
        resolved.forward_max_token_len_per_gpu = resolved.ppo_max_token_len_per_gpu
    if resolved.model.tokenizer_path is None:
        resolved.model.tokenizer_path = policy.tokenizer_path or policy.path
    if resolved.model.trust_remote_code is None:
        resolved.model.trust_remote_code = policy.trust_remote_code
    return resolved
