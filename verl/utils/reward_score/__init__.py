"""Built-in scorers, selected by the `data_source` of a row.

The package imports no scorer at import time: math-verify (about 0.7 s) and reasoning-gym (about 1.3 s, since it imports
every task) are imported for the first sample that needs them, or by `prepare`.
"""

from __future__ import annotations

from typing import Any

GSM8K_SOURCES = ("openai/gsm8k",)
MATH_SOURCES = ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500")
DAPO_SOURCES = ("math_dapo", "math", "math_dapo_reasoning")
DAPO_PREFIX = "aime"
GYM_PREFIX = "reasoning_gym/"


def default_compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    *,
    method: str = "strict",
    format_score: float = 0.0,
) -> float | dict[str, Any]:
    """Score a response with the scorer of its data source.

    Args:
        data_source: `openai/gsm8k`; `lighteval/MATH`, `DigitalLearningGmbH/MATH-lighteval`, `HuggingFaceH4/MATH-500`;
            `math_dapo`, `math`, `math_dapo_reasoning`, `aime*`; `reasoning_gym/<task>`.
        solution_str: the response of the model.
        ground_truth: the correct answer.
        extra_info: for reasoning-gym tasks the entry of the row, see `reasoning_gym_score.compute_score`.
        method: GSM8K only: "strict" requires `#### <number>`, "flexible" uses the last number.
        format_score: GSM8K only: the score of a wrong answer in the correct format.

    Returns:
        a score in [0, 1]; for the DAPO sources a dict with `score` (1 or -1), `acc` and `pred`.
        docs/rewards.md compares the scores with those of upstream verl.

    Raises:
        NotImplementedError: this data source has no built-in scorer.
        ValueError: the ground truth is empty or (GSM8K) no number, or `method` is unknown.
    """
    scorer = _scorer_of(data_source)
    if scorer == "gsm8k":
        from verl.utils.reward_score import gsm8k

        return gsm8k.compute_score(solution_str, ground_truth, method=method, format_score=format_score)
    if scorer == "gym":
        from verl.utils.reward_score import reasoning_gym_score

        return reasoning_gym_score.compute_score(
            data_source.removeprefix(GYM_PREFIX), solution_str, ground_truth, extra_info
        )
    from verl.utils.reward_score import math_score

    if scorer == "dapo":
        return math_score.compute_score_dapo(solution_str, ground_truth)
    return math_score.compute_score(solution_str, ground_truth)


def prepare(data_source: str) -> None:
    """Import the library of the scorer of `data_source`, so that the first sample takes no longer than the others.

    Raises:
        NotImplementedError: this data source has no built-in scorer.
        ValueError: unknown reasoning-gym task.
        ImportError: the library of the scorer is not installed.
    """
    scorer = _scorer_of(data_source)
    if scorer == "gym":
        from verl.utils.reward_score import reasoning_gym_score

        reasoning_gym_score.task_scorer(data_source.removeprefix(GYM_PREFIX))
    elif scorer in ("math", "dapo"):
        from verl.utils.reward_score import math_score

        math_score.compute_score("\\boxed{x+1}", "1+x")


def require_scorer(data_source: str) -> None:
    """Check that a data source has a built-in scorer.

    Raises:
        NotImplementedError: it has none; the message lists the known data sources.
    """
    _scorer_of(data_source)


def _scorer_of(data_source: str) -> str:
    if data_source in GSM8K_SOURCES:
        return "gsm8k"
    if data_source in MATH_SOURCES:
        return "math"
    if data_source in DAPO_SOURCES or data_source.startswith(DAPO_PREFIX):
        return "dapo"
    if data_source.startswith(GYM_PREFIX):
        return "gym"
    known = [*GSM8K_SOURCES, *MATH_SOURCES, *DAPO_SOURCES, f"{DAPO_PREFIX}*", f"{GYM_PREFIX}<task>"]
    raise NotImplementedError(
        f"data_source={data_source} has no built-in scorer (known: {', '.join(known)}); set "
        "reward.custom_reward_function.path to a file with compute_score(data_source, solution_str, ground_truth, "
        "extra_info)"
    )


__all__ = ["default_compute_score", "prepare", "require_scorer"]
