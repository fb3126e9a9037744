"""The reward: 1 for the right sum as the last answer.

The text has everything after the prompt, what the tools said included. So only what the model says last may count:
otherwise a call would be rewarded though the model never gave an answer.
"""

from typing import Any


def last_answer(solution_str: str) -> str:
    """What stands after the last tool response."""
    return solution_str.rpartition("</tool_response>")[2].strip().removeprefix("=")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> dict[str, float]:
    right = float(last_answer(solution_str) == ground_truth)
    return {"score": right, "acc": right, "used_tool": float(extra_info["tool_call_counts"] > 0)}
