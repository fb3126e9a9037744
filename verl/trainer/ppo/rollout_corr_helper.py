"""Rollout correction of tensors and batches, with upstream verl's names and arguments.

`verl.algorithms.rollout_correction` has the implementation. A run applies the correction itself, from the keys of
`algorithm.rollout_correction`; user code needs these functions only outside of a run.
"""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms.rollout_correction import apply_rollout_correction
from verl.config import RolloutCorrectionConfig
from verl.config.rollout_correction import resolve
from verl.protocol import DataProto
from verl.trainer.ppo.metrics import off_policy_metrics

__all__ = [
    "compute_offpolicy_metrics",
    "compute_rollout_correction_and_add_to_batch",
    "compute_rollout_correction_and_rejection_mask",
]


def compute_rollout_correction_and_rejection_mask(
    old_log_prob: torch.Tensor,
    rollout_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    rollout_is: str | None = None,
    rollout_is_threshold: str | float = 2.0,
    rollout_is_batch_normalize: bool = False,
    rollout_rs: str | None = None,
    rollout_rs_threshold: str | float | None = None,
) -> tuple[DataProto | None, torch.Tensor, dict[str, float]]:
    """Return importance weights, the response mask without rejected tokens, and metrics.

    Args:
        old_log_prob: log-probabilities of the trained policy, [B, T] float.
        rollout_log_prob: log-probabilities of the rollout policy, [B, T] float.
        response_mask: [B, T], not 0 for a generated token.
        rollout_is, rollout_is_threshold, rollout_is_batch_normalize, rollout_rs, rollout_rs_threshold: as the keys of
            `algorithm.rollout_correction`.

    Returns:
        a table with the column `rollout_is_weights` [B, T] float32, None without `rollout_is`; the mask [B, T];
        metrics `rollout_corr/*`.

    Raises:
        ConfigError: a setting is invalid.
        ValueError: the three shapes differ.
    """
    config = RolloutCorrectionConfig(
        rollout_is=rollout_is,
        rollout_is_threshold=rollout_is_threshold,
        rollout_is_batch_normalize=rollout_is_batch_normalize,
        rollout_rs=rollout_rs,
        rollout_rs_threshold=rollout_rs_threshold,
    )
    columns = old_log_prob, rollout_log_prob, response_mask
    weights, accepted, metrics = apply_rollout_correction(*columns, resolve(config))
    table = None if weights is None else DataProto.from_dict(tensors={"rollout_is_weights": weights})
    return table, accepted, {**metrics, **off_policy_metrics(*columns)}


def compute_rollout_correction_and_add_to_batch(
    batch: DataProto, rollout_corr_config: RolloutCorrectionConfig
) -> tuple[DataProto, dict[str, float]]:
    """Remove rejected tokens from `response_mask`, and add `rollout_is_weights` if the config asks for weights.

    Args:
        batch: columns `old_log_probs`, `rollout_log_probs`, `response_mask`, each [B, T]; changed in place.
        rollout_corr_config: the section `algorithm.rollout_correction`, or a mapping with its keys.

    Returns:
        the batch, and metrics `rollout_corr/*`.
    """
    keys = ("rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize", "rollout_rs", "rollout_rs_threshold")
    settings: dict[str, Any] = {key: rollout_corr_config[key] for key in keys if key in rollout_corr_config}
    table, accepted, metrics = compute_rollout_correction_and_rejection_mask(
        *(batch.batch[name] for name in ("old_log_probs", "rollout_log_probs", "response_mask")), **settings
    )
    batch.batch["response_mask"] = accepted
    return (batch if table is None else batch.union(table)), metrics


def compute_offpolicy_metrics(
    old_log_prob: torch.Tensor, rollout_log_prob: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, float]:
    """Return divergences and perplexities of the two policies without a prefix; see `metrics.off_policy_metrics`."""
    metrics = off_policy_metrics(old_log_prob, rollout_log_prob, response_mask)
    return {name.removeprefix("rollout_corr/"): value for name, value in metrics.items()}
