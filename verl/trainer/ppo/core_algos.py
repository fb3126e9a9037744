"""The algorithms' public names: registries to extend, and the functions that their entries are built from."""

from __future__ import annotations

from typing import Any

import torch

from verl.algorithms import advantages, losses
from verl.algorithms.advantages import *  # noqa: F403
from verl.algorithms.advantages import estimator_arguments, get_adv_estimator_fn
from verl.algorithms.losses import *  # noqa: F403
from verl.protocol import DataProto

__all__ = ["compute_advantage", *advantages.__all__, *losses.__all__]


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
