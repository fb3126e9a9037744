r"""Scorer of mathematical answers and helpers for `\boxed{...}`, under upstream verl's names."""

from __future__ import annotations

from verl.utils.reward_score.math_score import compute_score
from verl.utils.reward_score.text import braced, last_boxed

__all__ = ["compute_score", "last_boxed_only_string", "remove_boxed"]


def last_boxed_only_string(string: str) -> str | None:
    r"""Return the last complete `\boxed{...}` of a text, as `\boxed{content}`; None without one."""
    content = last_boxed(string)
    return None if content is None else f"\\boxed{{{content}}}"


def remove_boxed(s: str) -> str:
    r"""Return the content of `\boxed{content}`, or of `\boxed content`.

    Raises:
        ValueError: `s` is not a box.
    """
    group = s.removeprefix("\\boxed").lstrip(" ")
    if s.startswith("\\boxed") and group.startswith("{"):
        content = braced(group)
        if content is not None and group == f"{{{content}}}":
            return content
    elif s.startswith("\\boxed "):
        return s.removeprefix("\\boxed ")
    raise ValueError(f"remove_boxed: {s[:80]!r} is no \\boxed{{...}}; call last_boxed_only_string before")
