"""Where in a model's text the answer stands: behind the reasoning, in the last box."""

from __future__ import annotations

TAIL_CHARACTERS = 2000
"""Only this much of an answer's end is searched: an answer stands at the end, and patterns stay quick."""


def final_part(text: str) -> str:
    """The end of `text`, without what stands before the last `</think>`."""
    return text.rpartition("</think>")[2][-TAIL_CHARACTERS:]


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` of `text` holds, braces matched; None when there is none."""
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
            position += 1  # an escaped brace does not count
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : position]
        position += 1
    return None
