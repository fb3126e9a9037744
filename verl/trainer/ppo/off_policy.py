"""What a step does about the rollout policy being another than the one that is trained."""

from __future__ import annotations

import torch

from verl.algorithms.rollout_correction import apply_rollout_correction, correction_metrics
from verl.config.rollout_correction import Correction
from verl.protocol import DataProto
from verl.trainer.ppo.metrics import compute_mismatch_metrics


def correct_rollout(batch: DataProto, correction: Correction) -> tuple[DataProto, dict[str, float]]:
    """Add `rollout_is_weights` [B, T] float32 (where asked for) and `accepted_mask` [B, T], what rejection leaves.

    Reads `old_log_probs`, `rollout_log_probs` and `response_mask`, which stays: a score stands at the last token, and
    advantages would lose it if that token were rejected before.

    Returns:
        the batch, and the metrics of `mismatch_metrics`.
    """
    columns = batch.batch
    arguments = columns["old_log_probs"], columns["rollout_log_probs"], columns["response_mask"]
    weights, accepted, metrics = apply_rollout_correction(*arguments, correction)
    added = {"accepted_mask": accepted} | ({} if weights is None else {"rollout_is_weights": weights})
    return batch.union(DataProto.from_dict(tensors=added)), {**compute_mismatch_metrics(*arguments), **metrics}


def mismatch_metrics(batch: DataProto, training_log_probs: torch.Tensor, correction: Correction) -> dict[str, float]:
    """How far apart the policies are on the tokens of a batch, and what the correction makes of it.

    Args:
        batch: columns `rollout_log_probs` [B, T] and `response_mask` [B, T].
        training_log_probs: [B, T], of the policy that is trained.
    """
    arguments = training_log_probs, batch.batch["rollout_log_probs"], batch.batch["response_mask"]
    return {**compute_mismatch_metrics(*arguments), **correction_metrics(*arguments, correction)}


def drop_rejected(batch: DataProto) -> DataProto:
    """The batch with `accepted_mask`, where there is one, as its `response_mask`: what is trained on."""
    if "accepted_mask" in batch.batch:
        batch.batch["response_mask"] = batch.batch.pop("accepted_mask")
    return batch
