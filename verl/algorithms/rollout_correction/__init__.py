"""Importance weights and rejection between the policy that generated and the policy that is trained.

Throughout: mu is the rollout engine's policy, pi the trainer's, d = log pi - log mu of a token that was generated.
"""

from verl.algorithms.rollout_correction.apply import apply_rollout_correction, correction_metrics
from verl.algorithms.rollout_correction.rejection import rejection_mask
from verl.algorithms.rollout_correction.weights import importance_weights

__all__ = ["apply_rollout_correction", "correction_metrics", "importance_weights", "rejection_mask"]
