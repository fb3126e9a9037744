"""Checks of `critic`: the estimator that needs it, its batch sizes, and the files of its model."""

from __future__ import annotations

from verl.config import names
from verl.config.critic import CriticConfig
from verl.config.ppo import PPOConfig
from verl.config.rank_groups import actor_ranks_per_sample, critic_ranks_per_sample
from verl.config.roles import needs_critic, resolve_critic
from verl.config.sequence_parallel import critic_sequence_parallel
from verl.preflight.batch_sizes import check_division, check_micro_batch_limit, longest_sample
from verl.preflight.checks.model import TOKENIZER_FILES, check_override, find_model, has_tokenizer, max_positions
from verl.preflight.checks.same_function import check_attention, check_train_mode
from verl.preflight.checks.sequence_parallel import check_shared_sequences
from verl.preflight.findings import Findings
from verl.preflight.target import Target
from verl.utils.model_dir.model_files import ModelFiles, with_overrides

_PATH = "critic.model.path"


def check_critic(config: PPOConfig, found: Findings) -> None:
    """Check that estimator and critic fit together, and the critic's batch sizes."""
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    uses_values = estimator in names.CRITIC_ESTIMATORS
    if not needs_critic(config):
        if uses_values:
            found.errors.append(
                f"critic.enable=False: algorithm.adv_estimator={estimator} needs a critic; use critic.enable=null, or "
                "another estimator, such as grpo"
            )
        return
    if config.critic.model.path is None:
        found.errors.append(_missing_path_error(config, estimator, uses_values))
    if not uses_values and estimator in names.ADV_ESTIMATORS:
        found.notes.append(
            f"critic.enable=True with algorithm.adv_estimator={estimator}: the critic is trained, but this estimator "
            "does not use its values"
        )
    if uses_values and n > 1:
        found.notes.append(
            f"algorithm.adv_estimator={estimator} with actor_rollout_ref.rollout.n={n}: each sample is a separate "
            "trajectory; samples of the same prompt are not compared with each other"
        )
    _check_batches(config, found)


def _missing_path_error(config: PPOConfig, estimator: str, uses_values: bool) -> str:
    if uses_values:
        reason = f"algorithm.adv_estimator={estimator} needs a critic"
        alternative = "use an estimator without a critic, such as algorithm.adv_estimator=grpo"
    else:
        reason, alternative = "critic.enable=True needs a model", "set critic.enable=null"
    model = config.actor_rollout_ref.model.path
    path = "set it to the directory of a model" if model is None else f"use critic.model.path={model}, the policy's"
    return f"{_PATH} is not set: {reason}; {path}, or {alternative}"


def _check_batches(config: PPOConfig, found: Findings) -> None:
    own, critic, actor = config.critic, resolve_critic(config), config.actor_rollout_ref.actor
    assert critic.ppo_mini_batch_size is not None
    shared = critic_sequence_parallel(critic)
    keys = ("ppo_mini_batch_size", "use_dynamic_bsz", "ppo_micro_batch_size_per_gpu")
    differs = any(getattr(critic, key) != getattr(actor, key) for key in keys)
    ranks_per_sample = critic_ranks_per_sample(critic)
    if differs or ranks_per_sample != actor_ranks_per_sample(actor):  # equal values have the actor's check
        micro = None if critic.use_dynamic_bsz else critic.ppo_micro_batch_size_per_gpu
        check_division(
            (_source(own, keys[0]), critic.ppo_mini_batch_size),
            (_source(own, keys[2]), micro),
            ranks_per_sample,
            config,
            found,
        )
    for role in ("ppo", "forward"):
        samples, tokens = f"{role}_micro_batch_size_per_gpu", f"{role}_max_token_len_per_gpu"
        if role == "forward" and getattr(own, samples) is getattr(own, tokens) is None:
            continue  # equal to the limits of ppo, which are checked above
        if getattr(critic, samples) is None and not critic.use_dynamic_bsz and not actor.use_dynamic_bsz:
            continue  # the actor's check reports the missing limit
        check_micro_batch_limit(
            (_source(own, "use_dynamic_bsz"), critic.use_dynamic_bsz),
            (f"critic.{samples}", getattr(critic, samples)),
            (f"critic.{tokens}", getattr(critic, tokens)),
            longest_sample(config),
            shared,
            found,
        )


def _source(own: CriticConfig, name: str) -> str:
    """Return the key that gives a value: the critic's, or the actor's if the critic inherits it."""
    return f"actor_rollout_ref.actor.{name}" if getattr(own, name) is None else f"critic.{name}"


def check_critic_model(
    config: PPOConfig, policy: ModelFiles | None, target: Target, found: Findings
) -> ModelFiles | None:
    """Check the critic's model and return its files; None without a critic, or if they are missing or damaged.

    Args:
        policy: files of the policy's model, if they could be read.
    """
    path = config.critic.model.path
    if path is None or not needs_critic(config):
        return None
    files = find_model(_PATH, path, target, found)
    if files is None:
        return None
    override = config.critic.model.override_config
    check_override("critic.model", override, files, found)
    check_train_mode("critic.model", override, files, found)
    _check_tokenizer(config.critic.model.tokenizer_path, found)
    overridden = with_overrides(files, override)
    check_attention("critic.model", overridden, found)
    check_shared_sequences(config, "critic.model", overridden, found)
    longest, positions = longest_sample(config), max_positions(overridden)
    if positions is not None and longest > positions:
        found.errors.append(
            f"{_PATH}={path}: has {positions} positions, but a sample can have {longest} tokens "
            "(data.max_prompt_length + data.max_response_length); use another model, or lower one of the two"
        )
    tokens, policy_tokens = files.number("vocab_size"), None if policy is None else policy.number("vocab_size")
    if tokens is not None and policy_tokens is not None and tokens < policy_tokens:
        found.errors.append(
            f"{_PATH}={path}: has {tokens} tokens in its vocabulary, but the policy has {policy_tokens}; the critic "
            "reads the policy's tokens, so use a model with the policy's tokenizer"
        )
    return overridden


def _check_tokenizer(folder: str | None, found: Findings) -> None:
    if folder is not None and not has_tokenizer(folder):
        found.errors.append(
            f"critic.model.tokenizer_path={folder}: no tokenizer found (none of {', '.join(TOKENIZER_FILES)}); leave "
            "it out to use the policy's tokenizer"
        )
