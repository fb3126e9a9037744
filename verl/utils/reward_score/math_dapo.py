"""DAPO's scorer of mathematical answers, under upstream verl's name."""

from verl.utils.reward_score.math_score import compute_score_dapo as compute_score

__all__ = ["compute_score"]
