"""The table of policy losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.trainer.config import names
from verl.trainer.ppo.registry import F, Registry

POLICY_LOSSES = Registry(
    "policy loss", "actor_rollout_ref.actor.policy_loss.loss_mode", planned=names.PLANNED_POLICY_LOSSES
)


def register_policy_loss(name: str) -> Callable[[F], F]:
    """Decorator: make a function available as `actor_rollout_ref.actor.policy_loss.loss_mode=<name>`.

    The function is called by keyword with `old_log_prob`, `log_prob`, `advantages`, `response_mask`, each [B, T],
    `loss_agg_mode` (str), `config` (the `actor` section, and `config.global_batch_info`, the denominators to hand to
    `agg_loss`) and `rollout_is_weights` ([B, T] or None). It sees one micro-batch at a time and returns
    `(loss, metrics)`: a scalar tensor and a dict of scalar tensors. Both are added up over micro-batches and ranks, so
    they must be divided by the mini-batch's denominators, which `agg_loss(..., **config.global_batch_info)` does.
    """
    return POLICY_LOSSES.register(name)


def get_policy_loss_fn(name: str) -> Callable[..., Any]:
    """The loss registered under `name`; ValueError lists the known ones."""
    return POLICY_LOSSES.get(name)
