"""KL penalty in the reward: rewards minus a weighted KL divergence from the reference policy, and its weight."""

from __future__ import annotations

from typing import Protocol

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.kl import kl_penalty


class KLController(Protocol):
    """Weight of the KL penalty over the steps.

    Attributes:
        value: the current weight.
    """

    value: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Adapt the weight to the mean KL of one training step over `n_steps` samples."""


class FixedKLController:
    """A constant weight."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """Keep the weight."""


class AdaptiveKLController:
    """A weight that is adapted until the KL divergence is `target_kl` (arXiv:1909.08593, section 2.2).

    Each training step: `value *= 1 + clip(KL / target_kl - 1, -0.2, 0.2) * n_steps / horizon`.

    Args:
        init_kl_coef: the initial weight.
        target_kl: in nats per token.
        horizon: in samples.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: int):
        self.value, self._target, self._horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Adapt the weight to the mean KL per token of one training step over `n_steps` samples."""
        error = min(max(current_kl / self._target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self._horizon


def get_kl_controller(type: str, kl_coef: float, target_kl: float, horizon: int) -> KLController:
    """Build the controller from the keys of `algorithm.kl_ctrl`.

    Raises:
        ValueError: unknown type.
    """
    if type == "fixed":
        return FixedKLController(kl_coef)
    if type == "adaptive":
        return AdaptiveKLController(kl_coef, target_kl, horizon)
    raise ValueError(f"unknown algorithm.kl_ctrl.type={type!r}: use fixed or adaptive")


def penalized_rewards(
    token_level_scores: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    estimator: str,
    kl_coef: float,
) -> tuple[torch.Tensor, float]:
    """Return the scores minus `kl_coef` times the KL estimate of each token.

    Args:
        token_level_scores: [B, T] float.
        old_log_probs: [B, T] float; values outside the mask, including NaN, are ignored.
        ref_log_prob: [B, T] float; the same holds.
        response_mask: [B, T], not 0 for a token of the model.
        estimator: one of `verl.algorithms.kl.KL_TYPES`.
        kl_coef: weight of the penalty.

    Returns:
        token-level rewards [B, T] float32; and the KL in nats per token: the mean over the sequences that have a
        token of the mean over their tokens, 0 if no sequence has one.
    """
    kl = kl_penalty(old_log_probs, ref_log_prob, estimator)
    kl = torch.where(response_mask.bool(), kl, torch.zeros((), dtype=kl.dtype))
    per_sequence = sequence_mean(kl.double(), response_mask)[response_mask.bool().any(dim=-1)]
    current = per_sequence.mean().item() if per_sequence.numel() else 0.0
    return (token_level_scores - kl_coef * kl).to(torch.float32), current
