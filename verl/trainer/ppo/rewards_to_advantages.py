"""Scores to token-level rewards, and rewards to advantages."""

from __future__ import annotations

import torch

from verl.algorithms.kl_in_reward import KLController, penalized_rewards
from verl.config import AlgorithmConfig
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_advantage


def apply_kl_penalty(
    batch: DataProto, algorithm: AlgorithmConfig, controller: KLController
) -> tuple[DataProto, dict[str, float]]:
    """Add `token_level_rewards` [B, T] float32: the scores, minus a KL penalty if `algorithm.use_kl_in_reward`.

    Reads `token_level_scores`, and for the penalty `old_log_probs`, `ref_log_prob` and `response_mask`. The controller
    is updated with the KL of the step after its weight was used.

    Returns:
        The batch, and with a penalty the metrics `actor/reward_kl_penalty` (nats per token) and
        `actor/reward_kl_penalty_coeff`.
    """
    columns = batch.batch
    rewards, metrics = columns["token_level_scores"], {}
    if algorithm.use_kl_in_reward:
        rewards, kl = penalized_rewards(
            columns["token_level_scores"],
            columns["old_log_probs"],
            columns["ref_log_prob"],
            columns["response_mask"],
            estimator=algorithm.kl_penalty,
            kl_coef=controller.value,
        )
        metrics = {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": controller.value}
        controller.update(kl, n_steps=len(batch))
    return batch.union(DataProto.from_dict(tensors={"token_level_rewards": rewards})), metrics


def compute_response_mask(data: DataProto) -> torch.Tensor:
    """Return the attention mask of the responses, [B, T]: 1 for every token, also for those of tools.

    The column `response_mask` of a batch is 1 only for tokens of the model.
    """
    return data.batch["attention_mask"][:, -data.batch["responses"].shape[-1] :]


def apply_advantages(batch: DataProto, algorithm: AlgorithmConfig) -> DataProto:
    """Add `advantages` and `returns` (float32 [B, T]).

    Reads `token_level_rewards`, `response_mask`, `uid` and the other columns that the estimator requires.
    """
    advantages, returns = compute_advantage(algorithm.adv_estimator, batch, algorithm)
    return batch.union(DataProto.from_dict(tensors={"advantages": advantages, "returns": returns}))
