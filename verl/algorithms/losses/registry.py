"""The table of policy losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.algorithms.registry import F, Registry

POLICY_LOSSES = Registry("policy loss", "actor_rollout_ref.actor.policy_loss.loss_mode")
_SELECTORS: dict[Callable[..., Any], Callable[..., Any]] = {}


def register_policy_loss(name: str, *, select_tokens: Callable[..., Any] | None = None) -> Callable[[F], F]:
    """Decorator: make a function available as `actor_rollout_ref.actor.policy_loss.loss_mode=<name>`.

    The function is called by keyword with `old_log_prob`, `log_prob`, `advantages`, `response_mask`, each [B, T],
    `loss_agg_mode` (str), `config` (the `actor` section, and `config.global_batch_info`, the denominators to hand to
    `agg_loss`) and `rollout_is_weights` ([B, T] or None). It sees one micro-batch at a time and returns
    `(loss, metrics)`: a scalar tensor and a dict of scalar tensors. Both are added up over micro-batches and ranks, so
    they must be divided by the mini-batch's denominators, which `agg_loss(..., **config.global_batch_info)` does.

    A loss that treats some tokens in a way of their own, chosen by comparing all tokens of a mini-batch, names the
    choice in `select_tokens`. It is called once a mini-batch as `select_tokens(log_prob, old_log_prob, advantages,
    response_mask, config, seed)`, with the rows of all ranks in an order that does not depend on the split, log_prob
    being that of the present policy, without gradient. It returns [B, T] bool, and depends on its arguments alone. The
    loss then also gets `selected_tokens`, the rows that belong to its micro-batch.
    """

    def add(function: F) -> F:
        POLICY_LOSSES.register(name)(function)
        if select_tokens is not None:
            _SELECTORS[function] = select_tokens
        return function

    return add


def get_policy_loss_fn(name: str) -> Callable[..., Any]:
    """The loss registered under `name`; ValueError lists the known ones."""
    return POLICY_LOSSES.get(name)


def get_token_selector(loss: str | Callable[..., Any]) -> Callable[..., Any] | None:
    """The `select_tokens` of a loss, given by its name or as the function itself; None where it has none.

    Raises:
        ValueError: nothing is registered under that name.
    """
    return _SELECTORS.get(get_policy_loss_fn(loss) if isinstance(loss, str) else loss)
