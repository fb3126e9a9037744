r"""Canonical text of a mathematical answer: equal notations of one value become equal text.

`canonical` removes everything that has no mathematical meaning: delimiters, spacing commands, font commands, `\left`,
punctuation at the end. Units, percent signs and names such as `x =` have a meaning; `answer_equal` compares them.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARACTERS = 2000
"""Longest answer that is interpreted; it bounds the time of patterns and of sympy."""

_UNICODE = str.maketrans(
    {
        "\u2212": "-",
        "\u2013": "-",
        "\u00b2": "^{2}",
        "\u00b3": "^{3}",
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u00f7": "/",
        "\u2044": "/",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
        "\u00b0": r"^\circ ",
        "\uff05": "%",
        "\u2264": r"\le ",
        "\u2265": r"\ge ",
        "\u222a": r"\cup ",
        "\u2208": r"\in ",
    }
)
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")
# Digits in groups of three, separated by spaces, LaTeX spaces, `{,}` or `,\!`.
_SPACED_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\s|~|(?<!\\)\\[,;:>! ]|\{,\}|,\\!\s*)+\d{3})+(?!\d)")
_COMMA_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)(?!,\d)")
_NO_MEANING = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|thinspace|quad|qquad|nobreak)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:!> ]|~"  # not the end of a matrix row and a space
)
_FONTS = re.compile(
    r"\\(?:mbox|textbf|textit|textrm|textsf|texttt|textnormal|mathrm|mathbf|mathit|mathsf|operatorname)\s*\{"
)
_BOLD = re.compile(r"\\(?:boldsymbol|bm|pmb|boxed|fbox|mathord)\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_DEGREES = re.compile(
    r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|(?<=\d)\s*(?:\\text\{\s*degrees?\s*\}|degrees?)"
)
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_END = re.compile(r"[\s.,;:\\]+$")
_SUBSCRIPT = re.compile(r"_\s*\{\s*(\w+|\\text\{\s*\w+\s*\})\s*\}")


def canonical(text: str) -> str:
    """Return the canonical text of an answer, which may be empty.

    A text of more than `MAX_CHARACTERS` is returned as it is, without the spaces at its ends.
    """
    if len(text) > MAX_CHARACTERS:
        return text.strip()
    text = unicodedata.normalize("NFKC", text.translate(_UNICODE)).translate(_UNICODE)
    text = _strip_markdown(text)
    text = _DELIMITERS.sub(" ", text).replace("\\$", "").replace("\u20ac", "").replace("\u00a3", "")
    text = _SPACED_GROUPS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _NO_MEANING.sub(lambda match: "" if match.group() == "\\!" else " ", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text).replace("\\%", "%")
    text = re.sub(r"\\?sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text.replace("**", "^").replace("*", r"\cdot "))
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"\^\s*(-?\d{2,}|-\d)", r"^{\1}", text)
    text = _FONTS.sub(r"\\text{", text)
    while (simpler := _BOLD.sub(r"\1", text)) != text:
        text = simpler
    text = _DEGREES.sub("", text)
    text = re.sub(r",\s*,", ", ", _AND.sub(", ", text))
    text = _SUBSCRIPT.sub(r"_\1", text)
    return _strip_markdown(_END.sub("", re.sub(r"\s+", " ", text)))


def _strip_markdown(text: str) -> str:
    return text.strip().strip("*`_").strip()


def without_thousands_commas(text: str) -> str:
    """Remove the commas of numbers such as 1,234,567. The result differs from the text only if it has such numbers."""
    return _COMMA_GROUPS.sub(lambda match: match.group().replace(",", ""), text)


def squeezed(text: str) -> str:
    """Remove redundant braces and the spaces that do not separate digits, for a comparison as text."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\{(\w)\}", r"\1", text))


def split_list(text: str) -> list[str]:
    """Split at the commas and semicolons outside all brackets."""
    parts, start, depth = [], 0, 0
    for position, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in ",;" and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def split_group(text: str) -> tuple[str, list[str]] | None:
    r"""Split a set `\{...\}`, tuple or interval into its brackets and its elements; None if the text is none."""
    for opening, closing in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            inner = text[len(opening) : -len(closing)]
            if _is_balanced(inner):
                return opening + closing, split_list(inner)
    return None


def nesting(text: str) -> int:
    """Return the largest number of brackets that are open at the same time."""
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0
