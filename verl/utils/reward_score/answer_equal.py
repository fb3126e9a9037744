r"""Equality of mathematical answers.

Numbers are compared exactly: 0.5 equals \frac{1}{2}, and 0.333 does not equal \frac{1}{3}. Lists, tuples and intervals
are compared element by element, in order; sets in any order. Formulas are compared by the math-verify library
(https://github.com/huggingface/Math-Verify).

The time limits of the library are off: they need the main thread and its alarm signal. The reward workers have their
own limit per sample, which an `except` in a scorer cannot suppress.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from verl.utils.reward_score.answer_text import (
    MAX_CHARACTERS,
    canonical,
    nesting,
    split_group,
    split_list,
    squeezed,
    without_thousands_commas,
)

_NUMBER = re.compile(r"([-+]?)\s*(\d+\.?\d*|\.\d+)(?:\s*/\s*(\d+))?")
_MIXED = re.compile(r"([-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)")
_NAME = re.compile(
    r"((?:[A-Za-z]|\\[a-z]+)(?:_\w)?(?:\s*\(\s*[A-Za-z]\s*\))?)\s*(?:=|\\in(?![A-Za-z]))\s*(.+)", re.DOTALL
)
_WITH_BASE = re.compile(r"[-+]?[0-9A-Fa-f.]+_(?:\w+|\\text\{\s*\w+\s*\})")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
# A number or a formula, and a unit: \text{...}, or words after a space, or a common unit directly after a number.
_UNIT_TEXT = re.compile(r"(.*[\w})!])\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?[23]\}?)?", re.DOTALL)
_UNIT_WORDS = re.compile(
    r"([-+]?[\d.,]*\d(?:\s*/\s*\d+)?)(?:\s+([A-Za-z][A-Za-z /.-]*)|(cm|mm|km|kg|mg|ml|ft|mph|hours?|minutes?|seconds?"
    r"|days?|years?|inches|feet|meters?|miles?|dollars?|cents?|units?|points?))\s*(?:\^\s*\{?[23]\}?)?"
)
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Units that exclude each other.
_UNITS = {
    **dict.fromkeys(("mm", "millimeter", "millimeters"), "mm"),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), "cm"),
    **dict.fromkeys(("m", "meter", "meters"), "m"),
    **dict.fromkeys(("km", "kilometer", "kilometers"), "km"),
    **dict.fromkeys(("in", "inch", "inches"), "in"),
    **dict.fromkeys(("ft", "foot", "feet"), "ft"),
    **dict.fromkeys(("s", "second", "seconds"), "s"),
    **dict.fromkeys(("min", "minute", "minutes"), "min"),
    **dict.fromkeys(("h", "hour", "hours"), "h"),
    **dict.fromkeys(("day", "days"), "day"),
    **dict.fromkeys(("g", "gram", "grams"), "g"),
    **dict.fromkeys(("kg", "kilogram", "kilograms"), "kg"),
    **dict.fromkeys(("dollar", "dollars"), "dollar"),
    **dict.fromkeys(("cent", "cents"), "cent"),
}
# Precision of numbers that are no fractions, in digits, and the largest relative difference of equal ones.
_DIGITS = 60
_RELATIVE = 1e-40
# The time to parse a formula grows exponentially with its nesting.
_MAX_NESTING = 40


def answers_equal(answer: str, truth: str) -> bool:
    """Return True if two answers are equal; see the head of this file.

    A unit, a percent sign, a name (`x =`) or a currency that only one of them has is ignored; different ones are not
    equal. A percentage also equals its value: 20% equals 20 and 0.2.

    Args:
        answer: the answer of the model, without its box.
        truth: the correct answer.
    """
    left, right = canonical(answer), canonical(truth)
    if not left or not right:
        return False
    if len(left) > MAX_CHARACTERS or len(right) > MAX_CHARACTERS:
        return left == right
    if _equal(left, right):
        return True
    readings = without_thousands_commas(left), without_thousands_commas(right)
    return readings != (left, right) and _equal(*readings)


def _equal(left: str, right: str) -> bool:
    if squeezed(left) == squeezed(right):
        return True
    lists = split_list(left), split_list(right)
    if len(lists[0]) > 1 or len(lists[1]) > 1:
        return _all_equal(*lists)
    left, right = _without_brackets(left), _without_brackets(right)
    left_group, right_group = split_group(left), split_group(right)
    if left_group is not None and right_group is not None:
        same = _same_set if left_group[0] == "\\{\\}" else _all_equal
        return left_group[0] == right_group[0] and same(left_group[1], right_group[1])
    return _equal_scalars(left, right)


def _all_equal(left: list[str], right: list[str]) -> bool:
    return len(left) == len(right) and all(_equal(a, b) for a, b in zip(left, right, strict=True))


def _same_set(left: list[str], right: list[str]) -> bool:
    return all(any(_equal(a, b) for b in right) for a in left) and all(any(_equal(a, b) for a in left) for b in right)


def _without_brackets(text: str) -> str:
    """Remove brackets around a single value; they would be a set, tuple or interval around others."""
    group = split_group(text)
    return text[1:-1].strip() if group is not None and group[0] in ("()", "[]") and len(group[1]) == 1 else text


def _equal_scalars(left: str, right: str) -> bool:
    names = _NAME.fullmatch(left), _NAME.fullmatch(right)
    if names[0] is not None and names[1] is not None and squeezed(names[0][1]) == squeezed(names[1][1]):
        return _equal(names[0][2], names[1][2])
    if names[0] is not None and names[1] is None and not _is_relation(right):
        return _equal(_last_side(names[0][2]), right)
    if names[1] is not None and names[0] is None and not _is_relation(left):
        return _equal(left, _last_side(names[1][2]))
    percents = left.endswith("%"), right.endswith("%")
    if any(percents):
        left, right = left.removesuffix("%").strip(), right.removesuffix("%").strip()
        if _equal(left, right):
            return True
        percentage, other = (left, right) if percents[0] else (right, left)
        value = _number(percentage)
        return value is not None and percents[0] != percents[1] and _equal_values(str(value / 100), other)
    return _equal_with_units(left, right)


def _is_relation(text: str) -> bool:
    return re.search(r"[=<>]|\\(?:le|ge|leq|geq|neq|in|equiv)(?![A-Za-z])", text) is not None


def _last_side(text: str) -> str:
    return text.rpartition("=")[2].strip()


def _equal_with_units(left: str, right: str) -> bool:
    if _WITH_BASE.fullmatch(left) or _WITH_BASE.fullmatch(right):
        return False  # equal text was found equal before
    words = _words(left), _words(right)
    if all(words):
        return words[0] == words[1]
    (left_value, left_unit), (right_value, right_unit) = _split_unit(left), _split_unit(right)
    if left_unit in _UNITS and right_unit in _UNITS and _UNITS[left_unit] != _UNITS[right_unit]:
        return False
    return _equal_values(left_value, right_value)


def _words(text: str) -> str:
    """Return a text of words without its case, as in `(C)` and `\\text{Tuesday}`; empty if it is none."""
    plain = _TEXT.sub(r"\1", text).strip().strip("().").strip()
    return " ".join(plain.casefold().split()) if _WORDS.fullmatch(plain) and (plain != text or len(plain) > 1) else ""


def _split_unit(text: str) -> tuple[str, str]:
    match = _UNIT_TEXT.fullmatch(text) or _UNIT_WORDS.fullmatch(text)
    if match is None:
        return text, ""
    value, unit = match[1].strip(), next(part for part in match.groups()[1:] if part is not None).strip().casefold()
    first, _, rest = unit.partition(" ")
    if first in _MULTIPLES:
        number = _number(without_thousands_commas(value))
        if number is not None:
            return str(number * _MULTIPLES[first]), rest
    return value, unit.rstrip(".")


def _number(text: str) -> Fraction | None:
    """Return the value of an integer, a decimal, a fraction or a mixed number."""
    if match := _MIXED.fullmatch(text):
        sign, whole, over, under = match.groups()
        if int(under) == 0:
            return None
        value = int(whole) + Fraction(int(over), int(under))
    elif match := _NUMBER.fullmatch(text):
        sign, digits, under = match.groups()
        if under is not None and int(under) == 0:
            return None
        value = Fraction(digits.rstrip(".")) / int(under or 1)
    else:
        return None
    return -value if sign == "-" else value


def _equal_values(left: str, right: str) -> bool:
    numbers = _number(left), _number(right)
    if numbers[0] is not None and numbers[1] is not None:
        return numbers[0] == numbers[1]
    if ":" in left or ":" in right:  # a ratio or a time
        parts = left.split(":"), right.split(":")
        return len(parts[0]) == len(parts[1]) and all(_equal(a, b) for a, b in zip(*parts, strict=True))
    if squeezed(left) == squeezed(right):
        return True
    formulas = _parse(left), _parse(right)
    if formulas[0] is None or formulas[1] is None:
        return False
    try:
        return _equal_formulas(*formulas)
    except Exception:  # noqa: BLE001 - sympy raises many types for formulas that it cannot evaluate
        return False


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """Return the sympy object of a formula, or None."""
    from math_verify import LatexExtractionConfig, parse

    number = _number(text)
    if len(text) > MAX_CHARACTERS or nesting(text) > _MAX_NESTING:
        return None
    if number is None and re.search(r"(?<![\w^])\d+\s+\d", text):
        return None  # the library reads neighboring numbers as a sum
    found = parse(
        "\\boxed{" + (text if number is None else f"\\frac{{{number.numerator}}}{{{number.denominator}}}") + "}",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,
    )
    return next((one for one in found if not isinstance(one, str)), None)


def _equal_formulas(left: Any, right: Any) -> bool:
    from math_verify import verify
    from sympy import Expr, Float, Rational

    if isinstance(left, Expr) and isinstance(right, Expr) and left.is_number and right.is_number:
        exact = [value.xreplace({one: Rational(str(one)) for one in value.atoms(Float)}) for value in (left, right)]
        a, b = (value.evalf(_DIGITS) for value in exact)
        if not (a.is_finite and b.is_finite):
            return bool(a == b) and bool(a.is_extended_real)  # not for divisions by 0
        largest = max(abs(a), abs(b))
        return bool(abs(a - b) <= _RELATIVE * largest) or (0 in (a, b) and bool(largest < _RELATIVE))
    return bool(verify(right, left, float_rounding=12, timeout_seconds=None))


# The library warns that its time limits are off. The docstring of this file gives the reason.
for _name in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_name).addFilter(lambda record: not record.getMessage().startswith("Timeout is disabled"))
