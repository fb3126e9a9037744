"""Dynamic sampling, KL terms and the critic's warm-up against the rest of the config."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic
from verl.config.schema import show
from verl.preflight.findings import Findings

_FILTER = "algorithm.filter_groups"


def check_algorithm(config: PPOConfig, found: Findings) -> None:
    """What `algorithm` asks for has to be possible."""
    _check_filter(config, found)
    _check_gdpo(config, found)
    _check_kl_ctrl(config, found)
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


def _check_kl_ctrl(config: PPOConfig, found: Findings) -> None:
    control, n = config.algorithm.kl_ctrl, config.actor_rollout_ref.rollout.n
    if not config.algorithm.use_kl_in_reward:
        return
    if control.type == "fixed":
        if control.kl_coef == 0:
            found.warnings.append(
                "algorithm.kl_ctrl.kl_coef=0 with algorithm.use_kl_in_reward=True: the penalty counts nothing, and the "
                "reference model is held for its metrics alone"
            )
        return
    if control.kl_coef == 0:
        found.errors.append(
            "algorithm.kl_ctrl.kl_coef=0 with algorithm.kl_ctrl.type=adaptive: it is steered by factors, and so stays "
            "0; start from e.g. 0.001"
        )
    samples = config.data.train_batch_size * n
    smallest = samples // 5 + 1
    if control.horizon < smallest:
        found.errors.append(
            f"algorithm.kl_ctrl.horizon={control.horizon}: a step of {samples} samples (data.train_batch_size="
            f"{config.data.train_batch_size} x actor_rollout_ref.rollout.n={n}) changes the weight by up to 0.2 x "
            f"{samples} / {control.horizon} of itself, which takes it to 0 or below; use at least {smallest}, usual "
            "is many times that"
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
    elif weights is not None and not any(weights):
        found.errors.append(
            f"algorithm.gdpo_reward_weights={show(weights)}: every advantage would be 0; use null for 1 each"
        )
    if keys and ("" in keys or len(set(keys)) < len(keys)):
        found.errors.append(
            f"algorithm.gdpo_reward_keys={show(keys)}: {'an empty name' if '' in keys else 'a name is there twice'}; "
            "give each reward's name once"
        )


def _check_filter(config: PPOConfig, found: Findings) -> None:
    groups, data, n = config.algorithm.filter_groups, config.data, config.actor_rollout_ref.rollout.n
    drawn = data.gen_batch_size or data.train_batch_size
    if not groups.enable:
        if drawn != data.train_batch_size and not config.actor_rollout_ref.rollout.partial_rollout:
            found.errors.append(
                f"data.gen_batch_size={drawn}: differs from data.train_batch_size={data.train_batch_size}, which only "
                f"{_FILTER}.enable=True or actor_rollout_ref.rollout.partial_rollout=True makes sense of; leave it out"
            )
        return
    if not groups.metric:
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
