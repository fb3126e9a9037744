"""Policy losses: one file per loss, each a function that is registered by name. `common.py` holds the shared parts.

Every file of this folder is imported, so a new loss needs no line here. Also here: the value loss of the critic
(`value.py`); re-exports of the loss aggregation and the KL estimators.
"""

from verl.algorithms.aggregation import LOSS_AGG_MODES, agg_loss
from verl.algorithms.kl import kl_penalty
from verl.algorithms.losses.bypass import compute_policy_loss_bypass_mode
from verl.algorithms.losses.cispo import compute_policy_loss_cispo
from verl.algorithms.losses.common import get_policy_loss_fn, get_token_selector, register_policy_loss
from verl.algorithms.losses.covariance import compute_policy_loss_clip_cov, compute_policy_loss_kl_cov
from verl.algorithms.losses.dppo import compute_policy_loss_dppo_kl, compute_policy_loss_dppo_tv
from verl.algorithms.losses.dro import compute_policy_loss_dro
from verl.algorithms.losses.geo_mean import compute_policy_loss_geo_mean
from verl.algorithms.losses.gpg import compute_policy_loss_gpg
from verl.algorithms.losses.gspo import compute_policy_loss_gspo
from verl.algorithms.losses.sapo import compute_policy_loss_sapo
from verl.algorithms.losses.value import compute_value_loss
from verl.algorithms.losses.vanilla import compute_policy_loss_vanilla
from verl.extension.registry import import_all

__all__ = [
    "LOSS_AGG_MODES",
    "agg_loss",
    "compute_policy_loss_bypass_mode",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_dppo_kl",
    "compute_policy_loss_dppo_tv",
    "compute_policy_loss_dro",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_sapo",
    "compute_policy_loss_vanilla",
    "compute_value_loss",
    "get_policy_loss_fn",
    "get_token_selector",
    "kl_penalty",
    "register_policy_loss",
]

import_all(__name__, __path__)
