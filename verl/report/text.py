"""Text from a run on the page and in figures: control characters become visible symbols, long text is truncated."""

from __future__ import annotations

from typing import Any

from verl.utils.text import without_controls

_CHARACTERS = 4000


def visible(text: str, characters: int = _CHARACTERS) -> str:
    """Return text for the page: truncated, control characters as symbols, no broken characters."""
    rest = len(text) - characters
    return without_controls(text if rest <= 0 else f"{text[:characters]} … {rest:,} more characters")


def visible_value(value: Any) -> Any:
    """Return plain data with `without_controls` applied to every text and key."""
    if isinstance(value, str):
        return without_controls(value)
    if isinstance(value, dict):
        return {without_controls(key): visible_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [visible_value(item) for item in value]
    return value
