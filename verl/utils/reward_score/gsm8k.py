"""Scorer of GSM8K: a number after `####` (Cobbe et al. 2021, arXiv:2110.14168), compared by value."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any

from verl.utils.reward_score.text import after_reasoning

# Digits with optional commas and decimals; a full stop or comma after the number is punctuation.
_NUMBER = r"[-+\u2212]?\s?\\?\$?\s?(?:\d[\d,]*)?(?:\.\d+)?"
# The number may be in bold, in a formula or in a box.
_MARKED = re.compile(rf"####[\s*`$]*(?:\\boxed\s*\{{\s*)?({_NUMBER})(?![\d/]|\.\d)")
_ANY = re.compile(r"(?<![\w.])[-+\u2212]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])[-+\u2212]?\$?\.\d+")


def compute_score(
    solution_str: str, ground_truth: Any, *, method: str = "strict", format_score: float = 0.0, score: float = 1.0
) -> float:
    """Return `score` for the correct number, `format_score` for a wrong number, and 0.0 without a number.

    Args:
        solution_str: the response of the model. A number in the reasoning counts if none follows `</think>`.
        ground_truth: a number, or the solution text of GSM8K, which ends in `#### <number>`.
        method: "strict" uses the number after the last `####`, "flexible" the last number anywhere.
        format_score: the score of a wrong number.
        score: the score of the correct number.

    Raises:
        ValueError: the ground truth is not a number, or the method is unknown.
    """
    if method not in ("strict", "flexible"):
        raise ValueError(f"unknown reward.reward_kwargs.method={method} for GSM8K; use strict or flexible")
    correct = _value(str(ground_truth).rpartition("####")[2])
    if correct is None:
        raise ValueError(f"ground_truth={str(ground_truth)[-80:]!r} is not a number, which GSM8K rows need")
    answer = extract_answer(solution_str, method=method)
    if answer is None:
        return 0.0
    return score if answer == correct else format_score


def extract_answer(solution_str: str, *, method: str = "strict") -> Decimal | None:
    """Return the number in the response, or None; see `compute_score` for `method`."""
    return after_reasoning(solution_str, partial(_last_number, method=method))


def _last_number(text: str, method: str) -> Decimal | None:
    if method == "flexible":
        found = _ANY.findall(text)
        return _value(found[-1]) if found else None
    if "####" not in text:
        return None
    match = _MARKED.match(text, text.rindex("####"))
    return _value(match.group(1)) if match else None


def _value(text: str) -> Decimal | None:
    cleaned = re.sub(r"[\s,$\\]", "", text.strip()).replace("\u2212", "-").rstrip(".%")
    try:
        number = Decimal(cleaned)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
