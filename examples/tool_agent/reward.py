"""Reward function: 1 if the last answer is the right sum.

The text contains everything after the prompt, including tool responses. Only the model's last answer counts; otherwise
a call would be rewarded even if the model gave no answer.
"""

from typing import Any


def last_answer(solution_str: str) -> str:
    """Return the text after the last tool response."""
    return solution_str.rpartition("</tool_response>")[2].strip().removeprefix("=")


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> dict[str, float]:
    right = float(last_answer(solution_str) == ground_truth)
    return {"score": right, "acc": right, "used_tool": float(extra_info["tool_call_counts"] > 0)}
