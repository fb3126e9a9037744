"""Built-in scorers, chosen by a row's `data_source`.

Importing this package imports no scorer: math-verify (about 0.7 s) and reasoning-gym (about 1.3 s, its package imports
every task) come with the first sample that needs them, or with `prepare`.
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
    """Score an answer with the scorer of its data source.

    Args:
        data_source: `openai/gsm8k`; `lighteval/MATH`, `DigitalLearningGmbH/MATH-lighteval`, `HuggingFaceH4/MATH-500`;
            `math_dapo`, `math`, `math_dapo_reasoning`, `aime*`; `reasoning_gym/<task>`.
        solution_str: the model's answer.
        ground_truth: the right answer.
        extra_info: for reasoning-gym tasks the row's entry, see `reasoning_gym_score.compute_score`.
        method: GSM8K only: "strict" wants `#### <number>`, "flexible" takes the last number.
        format_score: GSM8K only: the score of a wrong answer in the right form.

    Returns:
        A score in [0, 1]; for the DAPO sources a dict with a score of 1 or -1, `acc` and `pred`.

    Raises:
        NotImplementedError: no built-in scorer for this data source.
        ValueError: the ground truth cannot be read, or `method` is unknown.
    """
    kind = _kind(data_source)
    if kind == "gsm8k":
        from verl.utils.reward_score import gsm8k

        return gsm8k.compute_score(solution_str, ground_truth, method=method, format_score=format_score)
    if kind == "gym":
        from verl.utils.reward_score import reasoning_gym_score

        return reasoning_gym_score.compute_score(
            data_source.removeprefix(GYM_PREFIX), solution_str, ground_truth, extra_info
        )
    from verl.utils.reward_score import math_score

    if kind == "dapo":
        return math_score.compute_score_dapo(solution_str, ground_truth)
    return math_score.compute_score(solution_str, ground_truth)


def prepare(data_source: str) -> None:
    """Import what the scorer of `data_source` needs, so that its first sample is as quick as the others.

    Raises:
        NotImplementedError: no built-in scorer for this data source.
        ValueError: no such reasoning-gym task.
        ImportError: the scorer's library is not installed.
    """
    kind = _kind(data_source)
    if kind == "gym":
        from verl.utils.reward_score import reasoning_gym_score

        reasoning_gym_score.task_scorer(data_source.removeprefix(GYM_PREFIX))
    elif kind in ("math", "dapo"):
        from verl.utils.reward_score import math_score

        math_score.compute_score("\\boxed{1}", "1")


def require_scorer(data_source: str) -> None:
    """Refuse a data source without a built-in scorer; NotImplementedError, which names those there are."""
    _kind(data_source)


def _kind(data_source: str) -> str:
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
