"""Importance weights and rejection between the rollout policy and the trained policy.

Read the files in this order: `weights.py`, `rejection.py`, `metrics.py`, `apply.py`. The keys, the presets and the
resolved settings (`Correction`) are in `verl/config/rollout_correction.py`.

Notation in all files: mu is the policy of the rollout engine, pi the policy of the trainer, and d = log pi - log mu for
a generated token.
"""

from verl.algorithms.rollout_correction.apply import apply_rollout_correction, correction_metrics
from verl.algorithms.rollout_correction.rejection import rejection_mask
from verl.algorithms.rollout_correction.weights import importance_weights

__all__ = ["apply_rollout_correction", "correction_metrics", "importance_weights", "rejection_mask"]
