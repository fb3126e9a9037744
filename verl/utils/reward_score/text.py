"""Location of the answer in the text of a model: in the last box, or on the last line `Answer: ...`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

_ANSWER = re.compile(r"(?i)answer[\s*_]{0,40}:[\s*_]{0,40}([^\n]+)")
_END = "</think>"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def after_reasoning(text: str, find: Callable[[str], Found | None]) -> Found | None:
    """Return the result of `find` for the text after the last `</think>`, or if it is None, for the complete text."""
    found = find(text.rpartition(_END)[2])
    return find(text.replace(_END, "\n")) if found is None and _END in text else found


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, or `\fbox{...}` without one; None if it is missing or not closed.

    `\boxed 5` holds the text up to the next `$` or line break.
    """
    for command in ("\\boxed", "\\fbox"):
        start = text.rfind(command)
        if start >= 0:
            rest = text[start + len(command) :].lstrip(" ")
            if rest.startswith("{"):
                return braced(rest)
            return re.split(r"[$\n]", rest, maxsplit=1)[0].strip() or None
    return None


def braced(text: str) -> str | None:
    """Return the content of the group `{...}` that a text begins with; None if it is not closed."""
    depth = 0
    for match in _BRACES.finditer(text):
        depth += (match.group() == "{") - (match.group() == "}")  # an escaped brace is not counted
        if depth == 0 and match.group() == "}":
            return text[1 : match.start()]
    return None


def last_answer_line(text: str) -> str | None:
    r"""Return the answer on the last line `Answer: ...`, also in bold; None without one.

    Of a line with a box the content of the box counts, of a line with a formula in `$...$` or `\(...\)` the formula.
    """
    lines = _ANSWER.findall(text)
    if not lines:
        return None
    line = lines[-1].strip()
    boxed = last_boxed(line)
    if boxed is not None:
        return boxed
    formula = re.search(r"(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)", line)
    return line if formula is None else (formula[1] or formula[2])
