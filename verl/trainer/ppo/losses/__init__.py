"""Policy losses: one pure function a file, found by name in a registry; their aggregation; the KL estimators."""

# each registers itself
from verl.trainer.ppo.losses import bypass as _bypass  # noqa: F401
from verl.trainer.ppo.losses import cispo as _cispo  # noqa: F401
from verl.trainer.ppo.losses import clip_cov as _clip_cov  # noqa: F401
from verl.trainer.ppo.losses import dppo as _dppo  # noqa: F401
from verl.trainer.ppo.losses import dro as _dro  # noqa: F401
from verl.trainer.ppo.losses import geo_mean as _geo_mean  # noqa: F401
from verl.trainer.ppo.losses import gpg as _gpg  # noqa: F401
from verl.trainer.ppo.losses import gspo as _gspo  # noqa: F401
from verl.trainer.ppo.losses import kl_cov as _kl_cov  # noqa: F401
from verl.trainer.ppo.losses import sapo as _sapo  # noqa: F401
from verl.trainer.ppo.losses import vanilla as _vanilla  # noqa: F401
from verl.trainer.ppo.losses.aggregation import LOSS_AGG_MODES, agg_loss
from verl.trainer.ppo.losses.kl import kl_penalty
from verl.trainer.ppo.losses.registry import get_policy_loss_fn, get_token_selector, register_policy_loss

__all__ = [
    "LOSS_AGG_MODES",
    "agg_loss",
    "get_policy_loss_fn",
    "get_token_selector",
    "kl_penalty",
    "register_policy_loss",
]
