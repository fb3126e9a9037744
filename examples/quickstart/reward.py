"""The quickstart's reward function, found through `reward.custom_reward_function.path`.

The reward is what reasoning-gym's own scorer gives: 1 for the right answer, else the share of letters in their
place. `acc` goes along as a metric: 1 only if the whole answer is right.
"""

from typing import Any

from verl.utils.reward_score import default_compute_score


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None
) -> dict[str, float]:
    score = default_compute_score(data_source, solution_str, ground_truth, extra_info)
    return {"score": score, "acc": float(solution_str.strip() == ground_truth)}
