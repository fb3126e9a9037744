"""Tensor mathematics of the algorithms: advantages, losses, KL, aggregation, rollout correction. No Ray, no engine."""
