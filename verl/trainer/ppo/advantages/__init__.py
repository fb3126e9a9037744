"""Advantage estimators: one pure function a file, found by name in a registry."""

from verl.trainer.ppo.advantages import grpo as _grpo  # noqa: F401  (registers itself)
from verl.trainer.ppo.advantages.registry import get_adv_estimator_fn, register_adv_est

__all__ = ["get_adv_estimator_fn", "register_adv_est"]
