r"""Scorers of mathematical answers: MATH, which requires a box, and DAPO, which requires `Answer: ...` or a box."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from verl.utils.reward_score.answer_equal import answers_equal
from verl.utils.reward_score.answer_text import canonical, without_thousands_commas
from verl.utils.reward_score.text import after_reasoning, last_answer_line, last_boxed

NO_ANSWER = "[INVALID]"
"""The prediction of a response without an answer, as in upstream verl."""


def compute_score(solution_str: str, ground_truth: Any) -> float:
    r"""Return 1.0 if the content of the last `\boxed{...}` equals the ground truth, else 0.0; see `answers_equal`.

    Args:
        solution_str: the response of the model. A box in the reasoning counts if none follows `</think>`.
        ground_truth: LaTeX, a plain expression or a number; a list holds several correct answers.

    Raises:
        ValueError: the ground truth is empty.
    """
    return float(_evaluate(solution_str, ground_truth, last_boxed)[0])


def compute_score_dapo(solution_str: str, ground_truth: Any) -> dict[str, Any]:
    r"""Score the last line `Answer: ...`, or the last box without such a line, with the rewards of DAPO.

    DAPO: arXiv:2503.14476, section 3.5. Arguments and errors are those of `compute_score`.

    Returns:
        `score` (1.0 if correct, else -1.0), `acc` (bool), `pred` (canonical text of the answer, a number without the
        commas of thousands; or `NO_ANSWER`).
    """
    correct, text = _evaluate(solution_str, ground_truth, _answer_line_or_box)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": NO_ANSWER if text is None else _vote(text)}


def _vote(answer: str) -> str:
    """Return the text by which equal answers are counted: 1,000 and 1000 are one number, but 1,000 may be in a list."""
    text = canonical(answer)
    number = without_thousands_commas(text)
    return number if re.fullmatch(r"-?\d+(\.\d+)?", number) else text


def _answer_line_or_box(text: str) -> str | None:
    line = last_answer_line(text)
    return last_boxed(text) if line is None else line


def _evaluate(solution_str: str, ground_truth: Any, find: Callable[[str], str | None]) -> tuple[bool, str | None]:
    several = not isinstance(ground_truth, str) and hasattr(ground_truth, "__iter__")
    truths = [_truth(str(one)) for one in (ground_truth if several else [ground_truth])]
    answer = after_reasoning(solution_str, find)
    return answer is not None and any(answers_equal(answer, truth) for truth in truths), answer


def _truth(text: str) -> str:
    boxed = last_boxed(text)
    truth = text if boxed is None else boxed
    if not canonical(truth):
        raise ValueError(f"ground_truth={text[:80]!r} has no answer; MATH and DAPO rows need one")
    return truth
