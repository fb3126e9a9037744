"""Reward function of the quickstart, selected by `reward.custom_reward_function.path`.

The reward is the score of reasoning-gym: 1 for the right answer, otherwise the share of letters at the right position.
`acc` is a metric: 1 only if the full answer is right.
"""

from typing import Any

from verl.utils.reward_score import default_compute_score


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    score = default_compute_score(data_source, solution_str, ground_truth, extra_info)
    return {"score": score, "acc": float(solution_str.strip() == ground_truth)}
