"""Text that every encoder and terminal accepts: no lone surrogates, which UTF-8 cannot encode, and no escapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The symbols of Unicode for the control characters, as far as it has one.
_SYMBOLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_SYMBOLS |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}


def without_controls(text: str) -> str:
    """Return valid text with control characters, such as the escape of a terminal, as symbols; \\n and \\t stay."""
    return valid_text(text).translate(_SYMBOLS)


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


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the dict of a JSON object, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a key stands twice; only its last value would count.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return made
