"""From scores to token-level rewards to advantages."""

from __future__ import annotations

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn


def apply_advantages(batch: DataProto, algorithm: AlgorithmConfig) -> DataProto:
    """Add `token_level_rewards`, `advantages` and `returns` (float32 [B, T]).

    Reads `token_level_scores`, `response_mask` and `uid`.
    """
    rewards = batch.batch["token_level_scores"]
    estimate = get_adv_estimator_fn(algorithm.adv_estimator)
    advantages, returns = estimate(
        token_level_rewards=rewards,
        response_mask=batch.batch["response_mask"],
        index=batch.non_tensor_batch["uid"],
        norm_adv_by_std_in_grpo=algorithm.norm_adv_by_std_in_grpo,
    )
    columns = {"token_level_rewards": rewards, "advantages": advantages, "returns": returns}
    return batch.union(DataProto.from_dict(tensors=columns))
