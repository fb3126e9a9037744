"""Correction for the difference between the rollout policy and the trained policy, and its metrics."""

from __future__ import annotations

import torch

from verl.algorithms.rollout_correction import apply_rollout_correction, correction_metrics
from verl.config.rollout_correction import Correction
from verl.protocol import DataProto
from verl.trainer.ppo.metrics import compute_mismatch_metrics
from verl.trainer.ppo.rollout_log_probs import RECOMPUTED


def correct_rollout(batch: DataProto, correction: Correction) -> tuple[DataProto, dict[str, float]]:
    """Add `accepted_mask` [B, T], and `rollout_is_weights` [B, T] float32 if the correction uses importance weights.

    Reads `old_log_probs`, `rollout_log_probs` and `response_mask`. The response mask does not change yet: the score is
    at the last token, and the advantages would lose it if that token were rejected here.

    Returns:
        The batch, and the metrics of `mismatch_metrics`. With a column `recomputed_samples` the mismatch is that of
        these samples: the `old_log_probs` of the others are the rollout's.
    """
    columns = batch.batch
    arguments = columns["old_log_probs"], columns["rollout_log_probs"], columns["response_mask"]
    weights, accepted, metrics = apply_rollout_correction(*arguments, correction)
    added = {"accepted_mask": accepted} | ({} if weights is None else {"rollout_is_weights": weights})
    old, rollout, measured = arguments
    if RECOMPUTED in columns:
        measured = measured * columns[RECOMPUTED].unsqueeze(-1)
    mismatch = compute_mismatch_metrics(old, rollout, measured)
    return batch.union(DataProto.from_dict(tensors=added)), {**mismatch, **metrics}


def mismatch_metrics(batch: DataProto, training_log_probs: torch.Tensor, correction: Correction) -> dict[str, float]:
    """Return metrics of the difference between the two policies on a batch, and of its correction.

    Args:
        batch: columns `rollout_log_probs` [B, T] and `response_mask` [B, T].
        training_log_probs: [B, T], log-probabilities of the trained policy.
        correction: the rollout correction.
    """
    arguments = training_log_probs, batch.batch["rollout_log_probs"], batch.batch["response_mask"]
    return {**compute_mismatch_metrics(*arguments), **correction_metrics(*arguments, correction)}


def drop_rejected(batch: DataProto) -> DataProto:
    """Replace `response_mask` by `accepted_mask`, if there is one, so that only accepted tokens are trained on."""
    if "accepted_mask" in batch.batch:
        batch.batch["response_mask"] = batch.batch.pop("accepted_mask")
    return batch
