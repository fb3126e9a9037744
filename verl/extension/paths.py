"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def expand_user(path: str | Path) -> Path:
    """Return a path with `~` and `~user` expanded; `path_problem` tells whether there is such a user."""
    return Path(os.path.expanduser(path))


def path_problem(path: str | Path) -> str | None:
    """Return why no file can have this path, and the way out; None if one can."""
    text = os.path.expanduser(path)
    if text.startswith("~"):
        return f"there is no user {text[1:].partition('/')[0]}; write the directory"
    if "\0" in text:
        return "contains a null character; remove it"
    longest = max(len(os.fsencode(name)) for name in text.split("/"))
    if longest > _LONGEST_NAME:
        return f"a name of {longest} bytes; a name has at most {_LONGEST_NAME}"
    size = len(os.fsencode(os.path.abspath(text)))
    return f"a path of {size} bytes; a path has at most {_LONGEST_PATH}" if size > _LONGEST_PATH else None
