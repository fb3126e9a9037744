"""The whole correction of a batch."""

from __future__ import annotations

import torch

from verl.trainer.config.rollout_correction import Correction
from verl.trainer.ppo.rollout_correction.metrics import correction_metrics
from verl.trainer.ppo.rollout_correction.rejection import rejection_mask
from verl.trainer.ppo.rollout_correction.weights import batch_norm_factor, importance_weights


def apply_rollout_correction(
    old_log_probs: torch.Tensor, rollout_log_probs: torch.Tensor, response_mask: torch.Tensor, correction: Correction
) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, float]]:
    """Weights, the mask of what is kept, and metrics of a whole batch. All arithmetic is in float64.

    Weights, their mean and the statistics of rejection are over the tokens of `response_mask`, rejected ones included:
    the two mechanisms do not know each other.

    Args:
        old_log_probs: of the trainer, [B, T] float.
        rollout_log_probs: of the engine that generated, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.

    Returns:
        weights [B, T] float32 without gradient, 0 where response_mask is 0, or None without rollout_is; the mask
        [B, T] in its dtype, 0 for what is rejected; `correction_metrics`.

    Raises:
        ValueError: the three shapes differ.
    """
    shapes = [tuple(x.shape) for x in (old_log_probs, rollout_log_probs, response_mask)]
    if len(set(shapes)) != 1:
        raise ValueError(f"old_log_probs, rollout_log_probs and response_mask have shapes {shapes}: give three of one")
    old, rollout = old_log_probs.double(), rollout_log_probs.double()
    weights = importance_weights(old, rollout, response_mask, correction)
    if weights is not None and correction.rollout_is is not None:
        if correction.rollout_is_batch_normalize:
            weights = weights / batch_norm_factor(weights, response_mask, correction.rollout_is)
        weights = weights.float()
    kept = rejection_mask(old, rollout, response_mask, correction.rejections)
    return weights, kept, correction_metrics(old, rollout, response_mask, correction)
