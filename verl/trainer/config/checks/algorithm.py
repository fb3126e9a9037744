"""Dynamic sampling, KL terms and the critic's warm-up against the rest of the config."""

from __future__ import annotations

from verl.trainer.config.critic import needs_critic
from verl.trainer.config.findings import Findings
from verl.trainer.config.ppo import PPOConfig
from verl.trainer.config.schema import show

_FILTER = "algorithm.filter_groups"


def check_algorithm(config: PPOConfig, found: Findings) -> None:
    """What `algorithm` asks for has to be possible."""
    _check_filter(config, found)
    _check_gdpo(config, found)
    if config.algorithm.use_kl_in_reward and config.actor_rollout_ref.actor.use_kl_loss:
        found.warnings.append(
            "algorithm.use_kl_in_reward=True with actor_rollout_ref.actor.use_kl_loss=True: the KL divergence counts "
            "twice, in the reward and in the loss; usually one of them is meant"
        )
    steps, warmup = config.trainer.total_training_steps, config.trainer.critic_warmup
    if warmup and not needs_critic(config):
        found.errors.append(
            f"trainer.critic_warmup={warmup}: there is no critic with algorithm.adv_estimator="
            f"{config.algorithm.adv_estimator}, and for that long nothing would be trained; leave it out"
        )
    elif steps is not None and warmup >= steps:
        found.warnings.append(
            f"trainer.critic_warmup={warmup}: the run ends after trainer.total_training_steps={steps}, so the policy "
            "is never trained"
        )


def _check_gdpo(config: PPOConfig, found: Findings) -> None:
    keys, weights = config.algorithm.gdpo_reward_keys, config.algorithm.gdpo_reward_weights
    if config.algorithm.adv_estimator != "gdpo":
        return
    if config.algorithm.use_kl_in_reward:
        found.errors.append(
            "algorithm.use_kl_in_reward=True: gdpo takes its rewards from algorithm.gdpo_reward_keys, which no KL "
            "penalty reaches; use actor_rollout_ref.actor.use_kl_loss=True"
        )
    if not keys:
        found.errors.append(
            "algorithm.gdpo_reward_keys is not set: gdpo needs the names of the rewards that the reward function "
            "returns beside its score, e.g. [format_reward,accuracy_reward]"
        )
    elif weights is not None and len(weights) != len(keys):
        found.errors.append(
            f"algorithm.gdpo_reward_weights={show(weights)}: {len(weights)} weights for {len(keys)} "
            f"algorithm.gdpo_reward_keys={show(keys)}; give one weight a key"
        )


def _check_filter(config: PPOConfig, found: Findings) -> None:
    groups, data, n = config.algorithm.filter_groups, config.data, config.actor_rollout_ref.rollout.n
    drawn = data.gen_batch_size or data.train_batch_size
    if not groups.enable:
        if drawn != data.train_batch_size:
            found.errors.append(
                f"data.gen_batch_size={drawn}: differs from data.train_batch_size={data.train_batch_size}, which only "
                f"{_FILTER}.enable=True makes sense of; leave it out"
            )
        return
    if groups.metric is None:
        found.errors.append(
            f"{_FILTER}.metric is not set: name what has to differ within a group, seq_reward or a number that the "
            "reward function returns, e.g. acc"
        )
    if n == 1:
        found.errors.append(
            f"{_FILTER}.enable=True with actor_rollout_ref.rollout.n=1: a group of one sample is never dropped; use "
            "n=4 or more"
        )
    if groups.metric == "seq_final_reward" and config.algorithm.use_kl_in_reward:
        found.errors.append(
            f"{_FILTER}.metric=seq_final_reward with algorithm.use_kl_in_reward=True: groups are judged before the "
            "KL penalty is known; use seq_reward"
        )
    if 0 < groups.max_num_gen_batches * drawn < data.train_batch_size:
        found.errors.append(
            f"{_FILTER}.max_num_gen_batches={groups.max_num_gen_batches}: x {drawn} prompts (data.gen_batch_size) "
            f"never fill data.train_batch_size={data.train_batch_size}; use more"
        )
