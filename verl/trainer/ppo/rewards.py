"""From scores to token-level rewards to advantages."""

from __future__ import annotations

from verl.protocol import DataProto
from verl.trainer.config import AlgorithmConfig
from verl.trainer.ppo.core_algos import compute_advantage


def apply_advantages(batch: DataProto, algorithm: AlgorithmConfig) -> DataProto:
    """Add `token_level_rewards`, `advantages` and `returns` (float32 [B, T]).

    Reads `token_level_scores`, `response_mask` and `uid`.
    """
    rewards = batch.batch["token_level_scores"]
    advantages, returns = compute_advantage(
        algorithm.adv_estimator, rewards, batch.batch["response_mask"], batch.non_tensor_batch["uid"], algorithm
    )
    columns = {"token_level_rewards": rewards, "advantages": advantages, "returns": returns}
    return batch.union(DataProto.from_dict(tensors=columns))
