"""Models that are given by their name on the Hugging Face hub: found in the hub's cache, and never downloaded here."""

from __future__ import annotations

import os
import re

_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def cached_model(name: str) -> str | None:
    """The directory of `owner/model` in the hub's cache; None for another path, and where it is not in the cache."""
    if not _NAME.fullmatch(name) or os.path.exists(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the hub allows
        return None
    return os.path.dirname(found) if isinstance(found, str) else None


def download_hint(path: str) -> str:
    """What to say of a model directory that does not exist (made absolute): it may be meant as a name on the hub."""
    name = os.path.relpath(path)
    if not _NAME.fullmatch(name):
        return ""
    return f"; if it is a name on the Hugging Face hub: `hf download {name}`, and the same command again"
