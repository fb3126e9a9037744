"""`extra_info.tools_kwargs` of a row: keywords for the tools, by tool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KEY = "extra_info.tools_kwargs"
_FORM = "{tool name: {create_kwargs: {...}, execute_kwargs: {...}}}"
# Arguments of `BaseTool.execute` that verl passes itself.
_RESERVED = ("instance_id", "parameters", "agent_data")


def read_tools_kwargs(extra_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the keywords of each tool, {} if the row has none.

    JSON text is decoded: in Parquet, text keeps the keywords of different rows apart. Null entries, which Parquet adds
    for the tools of other rows, are left out.

    Raises:
        ValueError: another form, a keyword that verl passes itself, or nothing although `need_tools_kwargs` is set.
    """
    given = extra_info.get("tools_kwargs")
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{KEY} is text but not JSON ({error}); write {_FORM}") from None
    tools = {name: kwargs for name, kwargs in _mapping(given, KEY).items() if kwargs is not None}
    if extra_info.get("need_tools_kwargs") and not tools:
        raise ValueError(
            f"extra_info.need_tools_kwargs is True but {KEY} is empty; set it to {_FORM}, or remove need_tools_kwargs"
        )
    for name, kwargs in tools.items():
        for part in ("create_kwargs", "execute_kwargs"):
            keywords = _mapping(_mapping(kwargs, f"{KEY}.{name}").get(part), f"{KEY}.{name}.{part}")
            if part == "execute_kwargs" and (reserved := [key for key in _RESERVED if key in keywords]):
                raise ValueError(f"{KEY}.{name}.{part} sets {', '.join(reserved)}, which verl passes itself; rename it")
    return tools


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is a {type(value).__name__}; write {KEY} as {_FORM}")
    return value
