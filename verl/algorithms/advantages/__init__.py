"""Advantage estimators: one file per estimator, each a pure function that is registered by name.

`common.py` holds the shared parts, `arguments.py` chooses the arguments of a call. Every file of this folder is
imported, so a new estimator needs no line here.
"""

from verl.algorithms.advantages.arguments import estimator_arguments, required_columns
from verl.algorithms.advantages.common import AdvantageEstimator, get_adv_estimator_fn, register_adv_est
from verl.algorithms.advantages.gae import compute_gae_advantage_return
from verl.algorithms.advantages.gdpo import compute_gdpo_outcome_advantage
from verl.algorithms.advantages.gpg import compute_gpg_outcome_advantage
from verl.algorithms.advantages.grpo import (
    compute_grpo_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
)
from verl.algorithms.advantages.grpo_passk import compute_grpo_passk_outcome_advantage
from verl.algorithms.advantages.opo import compute_opo_outcome_advantage
from verl.algorithms.advantages.optimal_token_baseline import (
    compute_multi_turn_optimal_token_baseline_advantage,
    compute_optimal_token_baseline_advantage,
)
from verl.algorithms.advantages.reinforce_plus_plus import (
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
)
from verl.algorithms.advantages.remax import compute_remax_outcome_advantage
from verl.algorithms.advantages.rloo import compute_rloo_outcome_advantage, compute_rloo_vectorized_outcome_advantage
from verl.extension.registry import import_all

__all__ = [
    "AdvantageEstimator",
    "compute_gae_advantage_return",
    "compute_gdpo_outcome_advantage",
    "compute_gpg_outcome_advantage",
    "compute_grpo_outcome_advantage",
    "compute_grpo_passk_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_multi_turn_optimal_token_baseline_advantage",
    "compute_opo_outcome_advantage",
    "compute_optimal_token_baseline_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "estimator_arguments",
    "get_adv_estimator_fn",
    "register_adv_est",
    "required_columns",
]

import_all(__name__, __path__)
