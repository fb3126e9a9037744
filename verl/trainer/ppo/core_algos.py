"""Public names of the algorithms: the registries that users extend, and the functions to build entries from.

The implementations are in `verl.algorithms`.
"""

from __future__ import annotations

from typing import cast

import torch

from verl.algorithms import advantages, losses
from verl.algorithms.advantages import *  # noqa: F403
from verl.algorithms.advantages import estimator_arguments, get_adv_estimator_fn
from verl.algorithms.losses import *  # noqa: F403
from verl.config import AlgorithmConfig
from verl.extension.upstream_names import missing_names
from verl.protocol import DataProto

__all__ = ["compute_advantage", *advantages.__all__, *losses.__all__]
__getattr__ = missing_names(__name__)


def compute_advantage(
    adv_estimator: str, batch: DataProto, config: AlgorithmConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages and returns, [B, T] float32, with the estimator registered under `adv_estimator`.

    Args:
        adv_estimator: the registered name.
        batch: columns `token_level_rewards` [B, T] float32, `response_mask` [B, T], `uid` (B group ids, equal for the
            samples of one prompt) if the estimator has a parameter `index`, and the columns that its parameters name.
        config: the `algorithm` section.

    Raises:
        ValueError: no estimator has that name, or it needs a column that `batch` does not have.
    """
    function = get_adv_estimator_fn(adv_estimator)
    tensors = cast(dict[str, torch.Tensor], dict(batch.batch.items()))
    groups = batch.non_tensor_batch.get("uid")
    arguments = estimator_arguments(function, tensors, batch.non_tensor_batch, groups, config)
    return function(**arguments)
