"""Checks of `distillation`: the teacher's model, its devices, and losses that its scores can be used for."""

from __future__ import annotations

from verl.config.engine_pools import EnginePool, teacher_pool
from verl.config.ppo import PPOConfig
from verl.preflight.batch_sizes import longest_sample
from verl.preflight.checks.engine_pools import check_pool
from verl.preflight.checks.model import max_positions
from verl.preflight.checks.token_ids import different_tokens
from verl.preflight.estimate import ServedModels
from verl.preflight.findings import Findings
from verl.preflight.target import Target
from verl.utils.model_dir.model_files import ModelFiles

_SECTION = "distillation"
_LOSS = f"{_SECTION}.distillation_loss"
_PATH = f"{_SECTION}.teacher_models.teacher_model.model_path"
# The gradient of log_prob - teacher_log_prob does not depend on the teacher.
_WITHOUT_TEACHERS_GRADIENT = ("k1", "kl")


def check_distillation(config: PPOConfig, target: Target, found: Findings) -> ServedModels:
    """Check the section, and return the teacher; empty without one, or if its files are missing or damaged."""
    pool = teacher_pool(config)
    if pool is None:
        return []
    _check_loss(config, found)
    teacher = check_pool(pool, target, found)
    if teacher is None or pool.path is None:
        return []
    _check_lengths(config, pool, teacher, found)
    _check_vocabulary(config, pool.path, found)
    return [(pool, teacher)]


def _check_loss(config: PPOConfig, found: Findings) -> None:
    loss, roles = config.distillation.distillation_loss, config.actor_rollout_ref
    if not loss.use_policy_gradient and loss.loss_mode in _WITHOUT_TEACHERS_GRADIENT:
        found.errors.append(
            f"{_LOSS}.loss_mode={loss.loss_mode} with use_policy_gradient=False: its gradient does not depend on the "
            f"teacher; use k3, or {_LOSS}.use_policy_gradient=True"
        )
    rollout = roles.rollout
    if rollout.temperature != 1:
        found.errors.append(
            f"actor_rollout_ref.rollout.temperature={rollout.temperature:g} with {_SECTION}.enabled=True: the teacher "
            "scores at temperature 1, so the policy would be compared with another distribution; use 1"
        )
    if rollout.replay_sampling_mask:
        found.errors.append(
            f"actor_rollout_ref.rollout.replay_sampling_mask=True with {_SECTION}.enabled=True: the teacher scores "
            "without the mask; use False, with top_p=1 and top_k=-1"
        )
    if not loss.use_task_rewards:
        unused = [name for name in ("use_kl_loss", "entropy_coeff") if getattr(roles.actor, name)]
        if unused:
            found.errors.append(
                f"{', '.join(f'actor_rollout_ref.actor.{name}={getattr(roles.actor, name)}' for name in unused)} with "
                f"{_LOSS}.use_task_rewards=False: only the distillation loss is trained on; leave them out, or use "
                f"{_LOSS}.use_task_rewards=True"
            )


def _check_lengths(config: PPOConfig, pool: EnginePool, teacher: ModelFiles, found: Findings) -> None:
    """Check that the teacher can read the longest sample."""
    needed, positions, limit = longest_sample(config) + 1, max_positions(teacher), pool.engine.max_model_len
    if positions is not None and needed > positions:
        found.errors.append(
            f"{_PATH}={pool.path}: has {positions} positions, but to score a sample takes up to {needed} "
            "(data.max_prompt_length + data.max_response_length + 1); use another teacher, or lower one of the two"
        )
    if limit is not None and limit < needed:
        found.errors.append(
            f"{pool.engine_section}.max_model_len={limit}: to score a sample takes up to {needed} "
            "(data.max_prompt_length + data.max_response_length + 1); raise it, or leave it out"
        )


def _check_vocabulary(config: PPOConfig, path: str, found: Findings) -> None:
    """Check that each token of the policy has the same id in the teacher, as far as the files of both show it."""
    policy = config.actor_rollout_ref.model.tokenizer_path or config.actor_rollout_ref.model.path
    assert policy is not None, "the caller knows the policy's model"
    different = different_tokens(policy, path)
    if different is not None:
        found.errors.append(
            f"{_PATH}={path}: {different}, so its scores would belong to other texts; use a teacher with the policy's "
            "tokenizer"
        )
