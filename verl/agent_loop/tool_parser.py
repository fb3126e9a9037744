"""Parse tool calls in the text of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

_HERMES = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call as the model wrote it.

    Attributes:
        name: name of the tool; empty if the call is malformed.
        arguments: arguments by name.
        problem: why the call is malformed; None if it is valid.
    """

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def parse_hermes(text: str) -> list[ToolCall]:
    """Return every `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in order. The end tag is required.

    `arguments` may also be a string with the JSON of the object, as in OpenAI's format.
    """
    return [_call(match) for match in _HERMES.findall(text)]


def _call(text: str) -> ToolCall:
    try:
        call = json.loads(text)
        arguments = call.get("arguments", {}) if isinstance(call, Mapping) else None
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    # RecursionError: deeply nested brackets.
    except (ValueError, RecursionError) as error:
        return ToolCall(problem=f"is not valid JSON ({error})")
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return ToolCall(problem="has no name")
    if not isinstance(arguments, Mapping):
        return ToolCall(problem=f"has arguments that are no object but a {type(arguments).__name__}")
    return ToolCall(call["name"], dict(arguments))


# Parsers by the value of `rollout.multi_turn.format`.
PARSERS: dict[str, Callable[[str], list[ToolCall]]] = {"hermes": parse_hermes}
