"""The KL divergence from the reference policy as a penalty in the reward, of a fixed or a steered weight."""

from __future__ import annotations

from typing import Protocol

import torch

from verl.algorithms.aggregation import sequence_mean
from verl.algorithms.losses import kl_penalty


class KLController(Protocol):
    """Gives the weight of the penalty."""

    value: float

    def update(self, current_kl: float, n_steps: int) -> None:
        """Take notice of a step's mean KL over `n_steps` samples."""


class FixedKLController:
    """The same weight always."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        """The weight stays."""


class AdaptiveKLController:
    """Steers the weight until the policy keeps a distance of `target_kl` (arXiv:1909.08593, section 2.2).

    Each step: `value *= 1 + clip(KL / target_kl - 1, -0.2, 0.2) * n_steps / horizon`.

    Args:
        init_kl_coef: the first weight.
        target_kl: nats per token.
        horizon: samples.
    """

    def __init__(self, init_kl_coef: float, target_kl: float, horizon: int):
        self.value, self._target, self._horizon = init_kl_coef, target_kl, horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        """Move the weight by a step's mean KL per token, over `n_steps` samples."""
        error = min(max(current_kl / self._target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n_steps / self._horizon


def get_kl_controller(type: str, kl_coef: float, target_kl: float, horizon: int) -> KLController:
    """The controller that `algorithm.kl_ctrl` describes.

    Raises:
        ValueError: an unknown kind.
    """
    if type == "fixed":
        return FixedKLController(kl_coef)
    if type == "adaptive":
        return AdaptiveKLController(kl_coef, target_kl, horizon)
    raise ValueError(f"algorithm.kl_ctrl.type={type!r} is unknown: use fixed or adaptive")


def penalised_rewards(
    token_level_scores: torch.Tensor,
    old_log_probs: torch.Tensor,
    ref_log_prob: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    estimator: str,
    kl_coef: float,
) -> tuple[torch.Tensor, float]:
    """Scores minus `kl_coef` times each token's KL estimate.

    Args:
        token_level_scores, old_log_probs, ref_log_prob, response_mask: [B, T]; what stands outside the mask, NaN
            included, does not matter to the penalty.
        estimator: one of `verl.algorithms.kl.KL_TYPES`.

    Returns:
        token-level rewards [B, T] float32, and the KL in nats per token: the mean over the sequences that have a token
        of their mean over tokens, 0 where none has.
    """
    kl = kl_penalty(old_log_probs, ref_log_prob, estimator)
    kl = torch.where(response_mask.bool(), kl, torch.zeros((), dtype=kl.dtype))
    per_sequence = sequence_mean(kl.double(), response_mask)[response_mask.bool().any(dim=-1)]
    current = per_sequence.mean().item() if per_sequence.numel() else 0.0
    return (token_level_scores - kl_coef * kl).to(torch.float32), current
