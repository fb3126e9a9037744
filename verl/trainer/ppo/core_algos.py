"""The algorithms' public names: registries to extend, and the functions that their entries are built from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.trainer.ppo.advantages import get_adv_estimator_fn, register_adv_est
from verl.trainer.ppo.advantages.grpo import compute_grpo_outcome_advantage
from verl.trainer.ppo.losses import LOSS_AGG_MODES, agg_loss, get_policy_loss_fn, kl_penalty, register_policy_loss
from verl.trainer.ppo.losses.vanilla import compute_policy_loss_vanilla

__all__ = [
    "LOSS_AGG_MODES",
    "agg_loss",
    "compute_advantage",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss_vanilla",
    "get_adv_estimator_fn",
    "get_policy_loss_fn",
    "kl_penalty",
    "register_adv_est",
    "register_policy_loss",
]


def compute_advantage(
    adv_estimator: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray,
    config: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, T] float32 by the estimator registered under `adv_estimator`.

    Args:
        token_level_rewards: [B, T] float32.
        response_mask: [B, T].
        index: B group ids, equal for the samples of one prompt.
        config: the `algorithm` section.

    Raises:
        ValueError: nothing is registered under that name.
    """
    return get_adv_estimator_fn(adv_estimator)(
        token_level_rewards=token_level_rewards, response_mask=response_mask, index=index, config=config
    )
