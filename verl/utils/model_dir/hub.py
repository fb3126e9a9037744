"""Models given by their name on the Hugging Face hub: found in the hub's local cache, never downloaded."""

from __future__ import annotations

import os
import re

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def cached_model(name: str) -> str | None:
    """Return the directory of `owner/model` in the hub's cache; None if it is not cached, and for other paths."""
    if not _NAME.fullmatch(name) or os.path.exists(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid name on the hub
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


def download_hint(path: str) -> str:
    """Return the end of an error about a missing model directory, if the path could be a name on the hub.

    Args:
        path: the absolute path.
    """
    name = os.path.relpath(path)
    if not _NAME.fullmatch(name):
        return ""
    return f"; if it is a name on the Hugging Face hub, run `hf download {name}` and the same command again"
