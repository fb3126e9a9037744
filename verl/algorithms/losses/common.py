"""Shared parts of the policy losses: registry, config access, ratio, PPO's clipped surrogate, and weighted means.

Each policy loss is a function in its own file. Apart from torch it needs this file alone, and a few losses the masked
means of `verl/algorithms/aggregation.py`.

Notation in the docstrings of the losses, for one token of a response:

- log_prob: log-probability under the policy that is trained, with gradient; old_log_prob: under the policy before
  the first update of the step.
- r = exp(log_prob - old_log_prob), the ratio; its exponent is clamped to +-20.
- A: the advantage.
- sg(x): x without gradient.
- low, high, c: `clip_ratio_low`, `clip_ratio_high` and `clip_ratio_c` of the `actor` section.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from verl.algorithms.aggregation import LOG_RATIO_BOUND, LossDenominators, agg_loss
from verl.config import ActorConfig
from verl.config.rollout_correction import Correction
from verl.extension.registry import F, Registry

LossOutput = tuple[torch.Tensor, dict[str, torch.Tensor]]
"""The loss, a scalar with gradient, and metrics by name, scalars without gradient.

All of them are shares of the mini-batch's values: they are added up over micro-batches and ranks.
"""

POLICY_LOSSES = Registry("policy loss", "actor_rollout_ref.actor.policy_loss.loss_mode")
_TOKEN_SELECTORS: dict[Callable[..., Any], Callable[..., Any]] = {}


@dataclass
class LossConfig(ActorConfig):
    """The `actor` section, extended by fields that only a policy loss reads.

    Attributes:
        global_batch_info: denominators of the mini-batch, the keywords of `agg_loss`; None: the rows that the loss gets
            are the whole mini-batch.
        rollout_correction: correction that the loss applies itself; None for a loss without one.
    """

    global_batch_info: LossDenominators | None = None
    rollout_correction: Correction | None = None

    @classmethod
    def extend(
        cls, actor: ActorConfig, global_batch_info: LossDenominators, rollout_correction: Correction | None
    ) -> LossConfig:
        """Return the values of `actor`, including attributes that were added to it, with these fields."""
        config = cls(global_batch_info=global_batch_info, rollout_correction=rollout_correction)
        vars(config).update(vars(actor))
        return config


def register_policy_loss(name: str | Enum, *, select_tokens: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Return a decorator that registers a loss as `actor_rollout_ref.actor.policy_loss.loss_mode=<name>`.

    The loss is called once per micro-batch, with keywords:

    - `old_log_prob`, `log_prob`, `advantages`, `response_mask`: each [B, T];
    - `loss_agg_mode`: str;
    - `config`: a `LossConfig`: the `actor` section, with `config.global_batch_info` added: the denominators of the
      mini-batch;
    - `rollout_is_weights`: [B, T], or None.

    It returns `(loss, metrics)`: a scalar tensor and a dict. The loss and metrics that are tensors are added up over
    micro-batches and ranks, so they must be divided by the denominators of the mini-batch:
    `agg_loss(..., **config.global_batch_info)` does this. Metrics that are numbers (`.item()`) are means over the
    micro-batch and are averaged, weighted by the tokens with response_mask 1; upstream verl averages them with equal
    weights. Micro-batches may return different metrics: one without a metric does not count in its mean.

    Some losses treat a few tokens differently and choose them by comparing all tokens of the mini-batch. Such a loss
    passes the choice as `select_tokens`. It is called once per mini-batch as `select_tokens(log_prob, old_log_prob,
    advantages, response_mask, config, seed)`. It gets the rows of all ranks, in an order that does not depend on how
    they are divided among ranks; log_prob is that of the current policy, without gradient. It returns [B, T] bool and
    must depend on its arguments only. The loss then gets one more keyword, `selected_tokens`: the rows of its
    micro-batch.
    """

    def add(function: F) -> F:
        POLICY_LOSSES.register(name)(function)
        if select_tokens is not None:
            _TOKEN_SELECTORS[function] = select_tokens
        return function

    return add


def get_policy_loss_fn(name: str | Enum) -> Callable[..., Any]:
    """Return the loss registered under `name`.

    Raises:
        ValueError: no loss has that name; the message lists the registered names.
    """
    return POLICY_LOSSES.get(name)


def get_token_selector(loss: str | Callable[..., Any]) -> Callable[..., Any] | None:
    """Return the `select_tokens` function of a loss, or None if it has none.

    Args:
        loss: the registered name, or the function itself.

    Raises:
        ValueError: no loss has that name.
    """
    return _TOKEN_SELECTORS.get(get_policy_loss_fn(loss) if isinstance(loss, str) else loss)


def require_config(config: ActorConfig | None) -> ActorConfig:
    """Return `config`.

    Raises:
        ValueError: it is None.
    """
    if config is None:
        raise ValueError("config=None: pass the `actor` section, which holds the settings of the loss")
    return config


def clip_range(config: ActorConfig | None) -> tuple[float, float]:
    """Return `clip_ratio_low` and `clip_ratio_high`; `clip_ratio` replaces one that is None."""
    config = require_config(config)
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def bounded_log_ratio(old_log_prob: torch.Tensor, log_prob: torch.Tensor) -> torch.Tensor:
    """Return log_prob - old_log_prob clamped to +-20, so that exp() does not overflow."""
    return (log_prob - old_log_prob).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PPO's pessimistic bound max(-A r, -A clip(r, 1 - low, 1 + high)) per token, and 1 where the clip binds."""
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(unclipped, clipped), (clipped > unclipped).to(ratio.dtype)


def weighted_loss(
    per_token: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str,
    config: ActorConfig | None,
    rollout_is_weights: torch.Tensor | None,
) -> torch.Tensor:
    """Aggregate a loss per token [B, T] times the importance weights, divided by the counts of the full mini-batch."""
    if rollout_is_weights is not None:
        per_token = per_token * rollout_is_weights.detach()
    return agg_loss(per_token, response_mask, loss_agg_mode, **denominators(config))


def token_means(
    values: dict[str, torch.Tensor], response_mask: torch.Tensor, config: ActorConfig | None
) -> dict[str, torch.Tensor]:
    """Return the means over the tokens of the mini-batch of values [B, T], without gradient."""
    return {
        name: agg_loss(value.detach(), response_mask, "token-mean", **denominators(config))
        for name, value in values.items()
    }


def denominators(config: ActorConfig | None) -> dict[str, float]:
    """Return `config.global_batch_info`, the keywords of `agg_loss`.

    It is empty if the config has none: the given rows are then the whole mini-batch.
    """
    return getattr(config, "global_batch_info", None) or {}
