"""Files of a run as plain, bounded values: JSON and YAML that may be damaged, edited or hostile.

The values consist of None, booleans, numbers, valid text, lists, and dicts whose keys are text. Nesting is limited,
and an integer beyond 19 digits becomes a float, so that no later recursion, conversion or output can fail.
"""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

from verl.utils.text import valid_text

MAX_DEPTH = 100
_MAX_INTEGER = 10**19


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: it is not JSON in UTF-8, or it is nested too deeply.
    """
    try:
        return plain(json.loads(text, parse_int=_parse_integer))
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text without aliases, which no record of a run contains; dates become text.

    Raises:
        ValueError: it is not YAML, has an alias, or is nested too deeply; the message is one line.
    """
    try:
        return plain(yaml.load(text, _Loader))
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    except Exception as error:  # PyYAML's constructors raise nearly any exception for `!!bool x`, `2026-13-45`, ...
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


def plain(value: Any, levels: int = MAX_DEPTH) -> Any:
    """Return a value of JSON or YAML as the head of this module describes.

    Raises:
        ValueError: the value has more than `levels` levels.
    """
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return valid_text(value)
    if isinstance(value, int):
        return value if abs(value) < _MAX_INTEGER else _as_float(value)
    if isinstance(value, dict | list | tuple | set) and not levels:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {valid_text(str(key)): plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item, levels - 1) for item in value]
    return valid_text(str(value))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases: they can make a value contain itself, or grow exponentially."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(None, None, f"found an alias (*{alias.anchor})", alias.start_mark)
        return super().compose_node(parent, index)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    try:
        return loader.construct_yaml_int(node)
    except ValueError:  # more than 4300 digits
        return float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def _construct_date(loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(loader.construct_scalar(node))  # a date out of range would raise


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _construct_date)


def _parse_integer(digits: str) -> int | float:
    # Python refuses to convert more than 4300 digits to an integer.
    return int(digits) if len(digits) <= 19 else float(digits)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
