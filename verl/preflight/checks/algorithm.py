"""Checks of `algorithm`: KL terms, GDPO's rewards and dynamic sampling. rollout_correction.py checks that section."""

from __future__ import annotations

from verl.config.ppo import PPOConfig
from verl.config.schema import show
from verl.config.stream import carries_prompts
from verl.preflight.findings import Findings

_FILTER = "algorithm.filter_groups"


def check_algorithm(config: PPOConfig, found: Findings) -> None:
    """Check the section against the rest of the config."""
    if config.algorithm.filter_groups.enable:
        _check_filter(config, found)
    else:
        _check_gen_batch_size(config, found)
    if config.algorithm.adv_estimator == "gdpo":
        _check_gdpo(config, found)
    if config.algorithm.use_kl_in_reward:
        _check_kl_ctrl(config, found)
        if config.actor_rollout_ref.actor.use_kl_loss:
            found.warnings.append(
                "algorithm.use_kl_in_reward=True with actor_rollout_ref.actor.use_kl_loss=True: the KL divergence "
                "counts twice, in the reward and in the loss; set one of the two to False"
            )


def _check_kl_ctrl(config: PPOConfig, found: Findings) -> None:
    control, n = config.algorithm.kl_ctrl, config.actor_rollout_ref.rollout.n
    if control.type == "fixed":
        if control.kl_coef == 0:
            found.warnings.append(
                "algorithm.kl_ctrl.kl_coef=0 with algorithm.use_kl_in_reward=True: the penalty has no effect, and the "
                "reference model computes only metrics; use e.g. 0.001, or algorithm.use_kl_in_reward=False"
            )
        return
    if control.kl_coef == 0:
        found.errors.append(
            "algorithm.kl_ctrl.kl_coef=0 with algorithm.kl_ctrl.type=adaptive: the controller multiplies the "
            "coefficient, so 0 stays 0; start with e.g. 0.001"
        )
    samples = config.data.train_batch_size * n
    smallest = samples // 5 + 1
    if control.horizon < smallest:
        found.errors.append(
            f"algorithm.kl_ctrl.horizon={control.horizon}: with {samples} samples per step (data.train_batch_size="
            f"{config.data.train_batch_size} x actor_rollout_ref.rollout.n={n}) one step can multiply the coefficient "
            f"by 1 - 0.2 x {samples} / {control.horizon}, which is not above 0; use at least {smallest}, usually a "
            "value many times larger"
        )


def _check_gdpo(config: PPOConfig, found: Findings) -> None:
    keys, weights = config.algorithm.gdpo_reward_keys, config.algorithm.gdpo_reward_weights
    if config.algorithm.use_kl_in_reward:
        found.errors.append(
            "algorithm.use_kl_in_reward=True: gdpo takes its rewards from algorithm.gdpo_reward_keys, which do not "
            "contain the KL penalty; use actor_rollout_ref.actor.use_kl_loss=True"
        )
    if not keys:
        found.errors.append(
            "algorithm.gdpo_reward_keys is not set: gdpo needs the names of the rewards that the reward function "
            "returns in addition to its score, e.g. [format_reward,accuracy_reward]"
        )
    elif weights is not None and len(weights) != len(keys):
        found.errors.append(
            f"algorithm.gdpo_reward_weights={show(weights)}: {len(weights)} weight(s) for {len(keys)} "
            f"algorithm.gdpo_reward_keys={show(keys)}; give one weight for each key"
        )
    elif weights is not None and not any(weights):
        found.errors.append(
            f"algorithm.gdpo_reward_weights={show(weights)}: every advantage would be 0; use null for weights of 1"
        )
    if keys and ("" in keys or len(set(keys)) < len(keys)):
        found.errors.append(
            f"algorithm.gdpo_reward_keys={show(keys)}: {'empty name' if '' in keys else 'duplicate name'}; give the "
            "name of each reward once"
        )


def _check_gen_batch_size(config: PPOConfig, found: Findings) -> None:
    """Check that `data.gen_batch_size` has no other value if nothing uses it."""
    data = config.data
    drawn = data.gen_batch_size or data.train_batch_size
    if drawn != data.train_batch_size and not carries_prompts(config):
        found.errors.append(
            f"data.gen_batch_size={drawn}: may differ from data.train_batch_size={data.train_batch_size} only with "
            f"{_FILTER}.enable=True or actor_rollout_ref.rollout.partial_rollout=True; leave it out"
        )


def _check_filter(config: PPOConfig, found: Findings) -> None:
    groups, data = config.algorithm.filter_groups, config.data
    drawn = data.gen_batch_size or data.train_batch_size
    if not groups.metric:
        found.errors.append(
            f"{_FILTER}.metric is not set: give the value that must differ within a group: seq_reward, or a number "
            "that the reward function returns, e.g. acc"
        )
    if config.actor_rollout_ref.rollout.n == 1:
        found.errors.append(
            f"{_FILTER}.enable=True with actor_rollout_ref.rollout.n=1: groups of one sample are never dropped; use "
            "n=4 or more"
        )
    if groups.metric == "seq_final_reward" and config.algorithm.use_kl_in_reward:
        found.errors.append(
            f"{_FILTER}.metric=seq_final_reward with algorithm.use_kl_in_reward=True: groups are filtered before the "
            "KL penalty is known; use seq_reward"
        )
    if 0 < groups.max_num_gen_batches * drawn < data.train_batch_size:
        found.errors.append(
            f"{_FILTER}.max_num_gen_batches={groups.max_num_gen_batches}: x {drawn} prompts (data.gen_batch_size) "
            f"cannot fill data.train_batch_size={data.train_batch_size}; use at least "
            f"{-(-data.train_batch_size // drawn)}, or 0 for no limit"
        )
