"""Location of the answer in the text of a model: after the reasoning, in the last box."""

from __future__ import annotations

TAIL_CHARACTERS = 2000
"""Number of characters at the end of a response that are searched; this bounds the time of the patterns."""


def final_part(text: str) -> str:
    """Return the end of `text`, starting after the last `</think>` at the earliest."""
    return text.rpartition("</think>")[2][-TAIL_CHARACTERS:]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{...}` of `text`, with matched braces; None without one."""
    end = len(text)
    while (start := text.rfind("\\boxed", 0, end)) >= 0:
        opening = start + len("\\boxed")
        while opening < len(text) and text[opening] == " ":
            opening += 1
        content = _braced(text, opening)
        if content is not None:
            return content
        end = start
    return None


def _braced(text: str, opening: int) -> str | None:
    if text[opening : opening + 1] != "{":
        return None
    depth = 0
    position = opening
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace is not counted
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : position]
        position += 1
    return None
