"""The table of advantage estimators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from verl.trainer.config import names
from verl.trainer.ppo.registry import F, Registry

ADV_ESTIMATORS = Registry("advantage estimator", "algorithm.adv_estimator", planned=names.PLANNED_ADV_ESTIMATORS)


def register_adv_est(name: str) -> Callable[[F], F]:
    """Decorator: make a function available as `algorithm.adv_estimator=<name>`.

    The function is called by keyword with `token_level_rewards` [B, T] float32, `response_mask` [B, T],
    `index` (array of B group ids) and `config` (the `algorithm` section), and returns `(advantages, returns)`,
    each [B, T] float32.
    """
    return ADV_ESTIMATORS.register(name)


def get_adv_estimator_fn(name: str) -> Callable[..., Any]:
    """The estimator registered under `name`; ValueError lists the known ones."""
    return ADV_ESTIMATORS.get(name)
