"""Public names of the algorithms: the registries that users extend, and the functions to build entries from.

The implementations are in `verl.algorithms`.
"""

from __future__ import annotations

from typing import Any, cast

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
        ValueError: no estimator has that name, it needs a column that `batch` does not have, or it returned something
            else, or a value that is not finite at a token of the mask.
    """
    function = get_adv_estimator_fn(adv_estimator)
    tensors = cast(dict[str, torch.Tensor], dict(batch.batch.items()))
    groups = batch.non_tensor_batch.get("uid")
    arguments = estimator_arguments(function, tensors, batch.non_tensor_batch, groups, config)
    return _checked(function(**arguments), adv_estimator, tensors["response_mask"])


def _checked(returned: Any, adv_estimator: str, response_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result of an estimator; ValueError if it is not (advantages, returns), finite and [B, T]."""
    name, shape = f"algorithm.adv_estimator={adv_estimator}", list(response_mask.shape)
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        count = f" of {len(returned)} values" if isinstance(returned, tuple | list) else ""
        raise ValueError(
            f"{name} returned a {type(returned).__name__}{count}; return a tuple (advantages, returns) of two tensors "
            "[B, T]"
        )
    for kind, value in zip(("advantages", "returns"), returned, strict=True):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} returned {kind} of type {type(value).__name__}; return a tensor [B, T]")
        if list(value.shape) != shape:
            raise ValueError(
                f"{name} returned {kind} of shape {list(value.shape)}; return a tensor [B, T], here {shape}"
            )
        if not bool(torch.isfinite(value[response_mask.bool()]).all()):
            raise ValueError(
                f"{name} returned {kind} with NaN or infinite values at tokens of the response; check divisions by 0, "
                "e.g. by the standard deviation of a group with equal rewards"
            )
    return returned[0], returned[1]
