r"""Scorer of mathematical answers with the math-verify library (https://github.com/huggingface/Math-Verify).

The time limits of the library are off: they need the main thread and its alarm signal. The reward workers have their
own limit per sample, which an `except` in a scorer cannot suppress.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from verl.utils.reward_score.text import final_part, last_boxed

_ANSWER_LINE = re.compile(r"(?i)\banswer\s*:\s*([^\n]+)")


def compute_score(solution_str: str, ground_truth: Any) -> float:
    r"""Return 1.0 if the final answer is mathematically equal to the ground truth, else 0.0.

    The final answer is the last `\boxed{...}`, else the last line `Answer: ...`, else the last formula or number that
    math-verify finds; only the text after the last `</think>` counts.

    Args:
        solution_str: the response of the model.
        ground_truth: LaTeX, a plain expression or a number; a list holds several correct answers.

    Raises:
        ValueError: the ground truth cannot be parsed.
    """
    return float(_evaluate(solution_str, ground_truth)[0])


def compute_score_dapo(solution_str: str, ground_truth: Any) -> dict[str, Any]:
    """Score like `compute_score`, with the rewards of DAPO (arXiv:2503.14476, section 3.5).

    Returns:
        `score` (1.0 if correct, else -1.0), `acc` (bool), `pred` (text of the final answer, empty without one).
    """
    correct, text = _evaluate(solution_str, ground_truth)
    return {"score": 1.0 if correct else -1.0, "acc": correct, "pred": text}


def _evaluate(solution_str: str, ground_truth: Any) -> tuple[bool, str]:
    from math_verify import verify

    several = list(ground_truth) if not isinstance(ground_truth, str) and hasattr(ground_truth, "__iter__") else None
    golds = [_gold(str(one)) for one in (several if several is not None else [ground_truth])]
    answer, text = _parse_answer(final_part(solution_str))
    if not answer:
        return False, text
    return any(verify(list(gold), answer, timeout_seconds=None) for gold in golds), text


@lru_cache(maxsize=4096)
def _gold(text: str) -> tuple[Any, ...]:
    inner = last_boxed(text)
    parsed = _parse_boxed(text if inner is None else inner)
    if not parsed:
        raise ValueError(f"ground_truth={text[:80]!r} is not a mathematical expression that math-verify can read")
    return tuple(parsed)


def _parse_answer(text: str) -> tuple[list[Any], str]:
    inner = last_boxed(text)
    if inner is None and (lines := _ANSWER_LINE.findall(text)):
        inner = lines[-1].strip().rstrip(".").replace("\\(", "").replace("\\)", "")
    if inner is not None:
        return _parse_boxed(inner), inner
    found = _parse(text)
    return found, str(found[-1]) if found else ""


def _parse_boxed(inner: str) -> list[Any]:
    return _parse("\\boxed{" + inner.strip().strip("$").strip() + "}")


def _parse(text: str) -> list[Any]:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


# The library warns that its time limits are off. The docstring of this file gives the reason.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: not record.getMessage().startswith("Timeout is disabled"))
