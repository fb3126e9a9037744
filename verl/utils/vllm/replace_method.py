"""Replacement of a method of vLLM or vllm-ascend by a wrapped one, once per process."""

from __future__ import annotations

from collections.abc import Callable

_MARK = "_verl_patched"


def replace_method(owner: type, name: str, wrap: Callable[[Callable], Callable]) -> str | None:
    """Replace a method that a class defines itself by `wrap(method)`.

    Returns:
        None, or the reason why nothing was replaced.
    """
    original = owner.__dict__.get(name)
    if original is None:
        return f"{owner.__name__} has no {name} of its own"
    if getattr(original, _MARK, False):
        return "already patched"
    replacement = wrap(original)
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)
    return None
