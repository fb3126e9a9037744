"""Parse tool calls in the text of a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.text import valid_text, valid_value

# The text of a call has no further start tag: an unfinished call must not swallow the next one.
_TAGS = re.compile(r"<think>|</think>|<tool_call>((?:(?!<tool_call>).)*?)</tool_call>", re.DOTALL)
THINK_START, THINK_END = "<think>", "</think>"


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


def parse_hermes(text: str, in_reasoning: bool = False) -> list[ToolCall]:
    """Return every `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` in order. The end tag is required.

    `arguments` may also be a string with the JSON of the object, as in OpenAI's format. Calls in the reasoning are not
    returned: those between `<think>` and `</think>`, those after a `<think>` that is never closed, and those before a
    `</think>` that was opened before the response.

    Args:
        text: one response of the model.
        in_reasoning: True if the prompt ends inside the reasoning, see `opens_reasoning`.
    """
    calls: list[ToolCall] = []
    position = _end_of_reasoning(text, 0) if in_reasoning else 0
    while match := _TAGS.search(text, position):
        position = match.end()
        if match.group() == THINK_START:
            position = _end_of_reasoning(text, position)
        elif match.group() == THINK_END:
            calls.clear()
        else:
            calls.append(_call(match.group(1)))
    return calls


def opens_reasoning(prompt: str) -> bool:
    """Return True if the text before a response ends with the start of the reasoning, which some templates add."""
    return prompt.rstrip().endswith(THINK_START)


def _end_of_reasoning(text: str, start: int) -> int:
    end = text.find(THINK_END, start)
    return len(text) if end < 0 else end + len(THINK_END)


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
    # JSON may escape half a character, which a tool cannot write or send.
    return ToolCall(valid_text(call["name"]), valid_value(arguments))


# Parsers by the value of `rollout.multi_turn.format`.
PARSERS: dict[str, Callable[[str, bool], list[ToolCall]]] = {"hermes": parse_hermes}
