"""Scores to token-level rewards, and rewards to advantages."""

from __future__ import annotations

from enum import Enum

import torch

from verl.algorithms.kl_in_reward import KLController, penalized_rewards
from verl.config import AlgorithmConfig
from verl.config.rollout_correction import Correction
from verl.extension.registry import registered_name
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.off_policy import correct_rollout, drop_rejected


def compute_rewards(
    batch: DataProto, algorithm: AlgorithmConfig, controller: KLController
) -> tuple[DataProto, dict[str, float]]:
    """Add `token_level_rewards` [B, T] float32: the scores, minus a KL penalty if `algorithm.use_kl_in_reward`.

    Returns:
        The batch, and the metrics of `apply_kl_penalty`.
    """
    if algorithm.use_kl_in_reward:
        return apply_kl_penalty(batch, controller, algorithm.kl_penalty)
    batch.batch["token_level_rewards"] = batch.batch["token_level_scores"]
    return batch, {}


def apply_kl_penalty(
    data: DataProto, kl_ctrl: KLController, kl_penalty: str = "kl"
) -> tuple[DataProto, dict[str, float]]:
    """Set `token_level_rewards` [B, T] float32: the scores minus a weighted KL divergence from the reference policy.

    The controller is updated with the KL of the step after its weight was used.

    Args:
        data: columns token_level_scores, old_log_probs, ref_log_prob and response_mask [B, T].
        kl_ctrl: weight of the penalty, from `verl.algorithms.kl_in_reward`.
        kl_penalty: a value of `algorithm.kl_penalty`.

    Returns:
        The same batch, and the metrics `actor/reward_kl_penalty` (nats per token) and `actor/reward_kl_penalty_coeff`.
    """
    columns = data.batch
    rewards, kl = penalized_rewards(
        columns["token_level_scores"],
        columns["old_log_probs"],
        columns["ref_log_prob"],
        columns["response_mask"],
        estimator=kl_penalty,
        kl_coef=kl_ctrl.value,
    )
    metrics = {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": kl_ctrl.value}
    kl_ctrl.update(kl, n_steps=len(data))
    columns["token_level_rewards"] = rewards
    return data, metrics


def batch_advantages(
    batch: DataProto, algorithm: AlgorithmConfig, correction: Correction, controller: KLController
) -> tuple[DataProto, dict[str, float]]:
    """Correct for the rollout policy, compute advantages and drop rejected tokens; return batch and metrics.

    Reads the columns of `correct_rollout`, `compute_rewards` and `apply_advantages`, and adds theirs.
    """
    metrics: dict[str, float] = {}
    if correction.bypass_mode:
        # The rollout policy counts as the old policy, so no forward pass is needed.
        batch = batch.union(DataProto.from_dict(tensors={"old_log_probs": batch.batch["rollout_log_probs"]}))
    elif "rollout_log_probs" in batch.batch:
        batch, metrics = correct_rollout(batch, correction)
    batch, kl_metrics = compute_rewards(batch, algorithm, controller)
    return drop_rejected(apply_advantages(batch, algorithm)), metrics | kl_metrics


def compute_response_mask(data: DataProto) -> torch.Tensor:
    """Return the attention mask of the responses, [B, T]: 1 for every token, also for those of tools.

    The column `response_mask` of a batch is 1 only for tokens of the model.
    """
    return data.batch["attention_mask"][:, -data.batch["responses"].shape[-1] :]


def apply_advantages(batch: DataProto, algorithm: AlgorithmConfig) -> DataProto:
    """Add `advantages` and `returns` (float32 [B, T]).

    Reads `token_level_rewards`, `response_mask`, `uid` and the other columns that the estimator requires.
    """
    advantages, returns = core_algos.compute_advantage(algorithm.adv_estimator, batch, algorithm)
    return batch.union(DataProto.from_dict(tensors={"advantages": advantages, "returns": returns}))


def compute_advantage(
    data: DataProto,
    adv_estimator: str | Enum,
    gamma: float = 1.0,
    lam: float = 1.0,
    num_repeat: int = 1,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgorithmConfig | None = None,
) -> DataProto:
    """Set `advantages` and `returns` [B, T] float32, with upstream verl's arguments; a run uses `apply_advantages`.

    Args:
        data: see `core_algos.compute_advantage`; without `response_mask`, all tokens of the responses count.
        adv_estimator: registered name.
        gamma, lam: for `gae`; other estimators read `config`.
        num_repeat: ignored, as in upstream verl.
        norm_adv_by_std_in_grpo: for `grpo`; other estimators read `config`.
        config: the `algorithm` section; None for the defaults.

    Raises:
        ValueError: no estimator has that name, or it needs a column that `data` does not have.
    """
    name = registered_name(adv_estimator, "advantage estimator")
    if name == "gae":
        config = AlgorithmConfig(gamma=gamma, lam=lam)
    elif name == "grpo":
        config = AlgorithmConfig(norm_adv_by_std_in_grpo=norm_adv_by_std_in_grpo)
    if "response_mask" not in data.batch:
        data.batch["response_mask"] = compute_response_mask(data)
    advantages, returns = core_algos.compute_advantage(name, data, config or AlgorithmConfig())
    data.batch["advantages"], data.batch["returns"] = advantages, returns
    return data
