"""The algorithms' public names: registries to extend, and the functions that their entries are built from."""

from __future__ import annotations

from typing import Any

import torch

from verl.protocol import DataProto
from verl.trainer.ppo.advantages import estimator_arguments, get_adv_estimator_fn, register_adv_est
from verl.trainer.ppo.advantages.grpo import compute_grpo_outcome_advantage
from verl.trainer.ppo.losses import (
    LOSS_AGG_MODES,
    agg_loss,
    get_policy_loss_fn,
    get_token_selector,
    kl_penalty,
    register_policy_loss,
)
from verl.trainer.ppo.losses.cispo import compute_policy_loss_cispo
from verl.trainer.ppo.losses.clip_cov import compute_policy_loss_clip_cov
from verl.trainer.ppo.losses.dppo import compute_policy_loss_dppo_kl, compute_policy_loss_dppo_tv
from verl.trainer.ppo.losses.dro import compute_policy_loss_dro
from verl.trainer.ppo.losses.geo_mean import compute_policy_loss_geo_mean
from verl.trainer.ppo.losses.gpg import compute_policy_loss_gpg
from verl.trainer.ppo.losses.gspo import compute_policy_loss_gspo
from verl.trainer.ppo.losses.kl_cov import compute_policy_loss_kl_cov
from verl.trainer.ppo.losses.sapo import compute_policy_loss_sapo
from verl.trainer.ppo.losses.value import compute_value_loss
from verl.trainer.ppo.losses.vanilla import compute_policy_loss_vanilla

__all__ = [
    "LOSS_AGG_MODES",
    "agg_loss",
    "compute_advantage",
    "compute_grpo_outcome_advantage",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_dppo_kl",
    "compute_policy_loss_dppo_tv",
    "compute_policy_loss_dro",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_sapo",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "get_adv_estimator_fn",
    "get_policy_loss_fn",
    "get_token_selector",
    "kl_penalty",
    "register_adv_est",
    "register_policy_loss",
]


def compute_advantage(adv_estimator: str, batch: DataProto, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, T] float32 by the estimator registered under `adv_estimator`.

    Args:
        batch: columns `token_level_rewards` [B, T] float32, `response_mask` [B, T], `uid` (B group ids, equal for the
            samples of one prompt), and what else the estimator names among its parameters.
        config: the `algorithm` section.

    Raises:
        ValueError: nothing is registered under that name, or the estimator names a column that `batch` lacks.
    """
    function = get_adv_estimator_fn(adv_estimator)
    arguments = estimator_arguments(
        function, dict(batch.batch.items()), batch.non_tensor_batch, batch.non_tensor_batch["uid"], config
    )
    return function(**arguments)
