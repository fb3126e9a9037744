"""Policy losses: one pure function a file, found by name in a registry; their aggregation; the KL estimators."""

from verl.trainer.ppo.losses import vanilla as _vanilla  # noqa: F401  (registers itself)
from verl.trainer.ppo.losses.aggregation import LOSS_AGG_MODES, agg_loss
from verl.trainer.ppo.losses.kl import kl_penalty
from verl.trainer.ppo.losses.registry import get_policy_loss_fn, register_policy_loss

__all__ = ["LOSS_AGG_MODES", "agg_loss", "get_policy_loss_fn", "kl_penalty", "register_policy_loss"]
