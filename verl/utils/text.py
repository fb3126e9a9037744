"""Text that every encoder accepts: Python strings may hold lone surrogates, which UTF-8 cannot encode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def valid_text(text: str) -> str:
    """Return `text` with each lone surrogate replaced by U+FFFD; two that form a character become that character.

    JSON's escapes (half an emoji, `\\ud83d`) and undecodable file names contain them. Tokenizers, files and trackers
    refuse such text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def valid_value(value: Any) -> Any:
    """Return lists and dicts with `valid_text` applied to every text and key; other values are unchanged."""
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, Mapping):
        return {valid_value(key): valid_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [valid_value(item) for item in value]
    return value
