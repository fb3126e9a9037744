"""The critic: whether there is one, its model's files, its batches."""

from __future__ import annotations

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.config.roles import needs_critic, resolve_critic
from verl.preflight.checks.batches import check_division, check_limits
from verl.preflight.checks.model import (
    TOKENIZER_FILES,
    check_vocabulary,
    find_model,
    has_tokenizer,
    scales_positions,
)
from verl.preflight.findings import Findings
from verl.preflight.target import Scope
from verl.utils.model_dir.model_files import ModelFiles

_PATH = "critic.model.path"


def check_critic(config: PPOConfig, found: Findings) -> None:
    """The estimator and the critic have to go together, and the critic's batches with the rest."""
    estimator, n = config.algorithm.adv_estimator, config.actor_rollout_ref.rollout.n
    reads = estimator in names.CRITIC_ESTIMATORS
    if not needs_critic(config):
        if reads:
            found.errors.append(
                f"critic.enable=False: algorithm.adv_estimator={estimator} needs a critic; use critic.enable=null, or "
                "another estimator, such as grpo"
            )
        return
    if config.critic.model.path is None:
        found.errors.append(_no_path(config, estimator, reads))
    if not reads and estimator in names.ADV_ESTIMATORS:
        found.notes.append(
            f"critic.enable=True with algorithm.adv_estimator={estimator}: the critic is trained, and no advantage is "
            "made of its values"
        )
    if reads and n > 1:
        found.notes.append(
            f"algorithm.adv_estimator={estimator} with actor_rollout_ref.rollout.n={n}: each sample is a trajectory of "
            "its own; the samples of a prompt are not compared with each other"
        )
    _check_batches(config, found)


def _no_path(config: PPOConfig, estimator: str, reads: bool) -> str:
    why = f"algorithm.adv_estimator={estimator} needs a critic" if reads else "critic.enable=True asks for a critic"
    way_out = (
        "use an estimator without one, such as algorithm.adv_estimator=grpo" if reads else "set critic.enable=null"
    )
    model = config.actor_rollout_ref.model.path
    start = "give the directory it starts from" if model is None else f"use critic.model.path={model}, the policy's"
    return f"{_PATH} is not set: {why}; {start}, or {way_out}"


def _check_batches(config: PPOConfig, found: Findings) -> None:
    own, critic, actor = config.critic, resolve_critic(config), config.actor_rollout_ref.actor
    assert critic.ppo_mini_batch_size is not None
    keys = ("ppo_mini_batch_size", "use_dynamic_bsz", "ppo_micro_batch_size_per_gpu")
    if any(getattr(critic, key) != getattr(actor, key) for key in keys):  # else judged as the actor's
        micro = None if critic.use_dynamic_bsz else critic.ppo_micro_batch_size_per_gpu
        check_division((_key(own, keys[0]), critic.ppo_mini_batch_size), (_key(own, keys[2]), micro), config, found)
    longest = config.data.max_prompt_length + config.data.max_response_length
    for role in ("ppo", "forward"):
        size, tokens = f"{role}_micro_batch_size_per_gpu", f"{role}_max_token_len_per_gpu"
        if role == "forward" and getattr(own, size) is getattr(own, tokens) is None:
            continue  # the limits judged before
        if getattr(critic, size) is None and not critic.use_dynamic_bsz and not actor.use_dynamic_bsz:
            continue  # the actor lacks the same
        check_limits(
            (_key(own, "use_dynamic_bsz"), critic.use_dynamic_bsz),
            (f"critic.{size}", getattr(critic, size)),
            (f"critic.{tokens}", getattr(critic, tokens)),
            longest,
            found,
        )


def _key(own: object, name: str) -> str:
    """Where a value comes from: the critic's own key, or the actor's that stands in for it."""
    return f"actor_rollout_ref.actor.{name}" if getattr(own, name) is None else f"critic.{name}"


def check_critic_model(
    config: PPOConfig, policy: ModelFiles | None, scope: Scope, found: Findings
) -> ModelFiles | None:
    """What the critic's files say, or None where there is no critic or they are missing or damaged."""
    path = config.critic.model.path
    if path is None or not needs_critic(config):
        return None
    files = find_model(_PATH, path, scope, found)
    if files is None:
        return None
    check_vocabulary("critic.model", config.critic.model.override_config, files, found)
    _check_tokenizer(config.critic.model.tokenizer_path, found)
    data = config.data
    longest = data.max_prompt_length + data.max_response_length
    positions = files.number("max_position_embeddings", "n_positions")
    override = config.critic.model.override_config.get("max_position_embeddings")
    if isinstance(override, int):
        positions = override
    if positions is not None and longest > positions and not scales_positions(files):
        found.errors.append(
            f"{_PATH}={path}: has {positions} positions, and a sample may have {longest} tokens "
            "(data.max_prompt_length + data.max_response_length); use another model, or lower one of the caps"
        )
    ours, theirs = files.number("vocab_size"), policy and policy.number("vocab_size")
    if ours is not None and theirs is not None and ours < theirs:
        found.errors.append(
            f"{_PATH}={path}: knows {ours} tokens and the policy {theirs}; the critic reads the policy's tokens, so "
            "use a model with its tokenizer"
        )
    return files


def _check_tokenizer(folder: str | None, found: Findings) -> None:
    if folder is not None and not has_tokenizer(folder):
        found.errors.append(
            f"critic.model.tokenizer_path={folder}: no tokenizer there (none of {', '.join(TOKENIZER_FILES)}); leave "
            "it out for the policy's"
        )
