"""Read the tool config file (`rollout.multi_turn.tool_config_path`), check it and construct the tools.

tools:
  - class_name: my_tools.Search            # or path/to/file.py:Search, relative to this file
    config:                                # passed to the class
      type: native
      timeout: 30                          # time limit of a call in seconds
    tool_schema:                           # optional if the class defines a schema
      type: function
      function: {name: search, description: ..., parameters: {type: object, properties: {...}, required: [...]}}
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from verl.extension.paths import expand_user
from verl.extension.user_class import UserClassError, check_class, load_class
from verl.extension.user_files import check_unique, read_yaml_list
from verl.tools.base_tool import BaseTool
from verl.tools.function_tool import KEY as FUNCTION_KEY
from verl.tools.function_tool import load_function_tools
from verl.tools.schemas import OpenAIFunctionToolSchema

KEY = "actor_rollout_ref.rollout.multi_turn.tool_config_path"
DEFAULT_TIMEOUT = 30.0
_ENTRY_KEYS = ("class_name", "config", "tool_schema")


class ToolConfigError(ValueError):
    """A tool config file cannot be used; the message names the entry and the reason."""


@dataclass(frozen=True)
class ToolEntry:
    """One entry of the file, checked without importing its class."""

    class_name: str
    config: dict[str, Any]
    tool_schema: OpenAIFunctionToolSchema | None


def read_tool_config(path: str) -> list[ToolEntry]:
    """Return the entries of a tool config file, without importing the classes.

    Raises:
        ToolConfigError: the file is missing or not YAML, or an entry is invalid.
    """
    folder = expand_user(path).parent
    try:
        tools = read_yaml_list(path, KEY, section="tools", entry="{class_name} for each tool")
    except ValueError as error:
        raise ToolConfigError(str(error)) from error
    entries = [_entry(tool, location, folder) for location, tool in tools]
    _check_names([entry.tool_schema.function.name for entry in entries if entry.tool_schema], path)
    return entries


def _entry(tool: Any, location: str, folder: Path) -> ToolEntry:
    if not isinstance(tool, Mapping) or not isinstance(tool.get("class_name"), str):
        raise ToolConfigError(f"{location} has no class_name; set package.module.Class, or path/to/file.py:Class")
    unknown = sorted(str(key) for key in set(tool) - {*_ENTRY_KEYS, "mcp"})
    if unknown:
        raise ToolConfigError(f"{location}: unknown key {', '.join(unknown)}; the keys are {', '.join(_ENTRY_KEYS)}")
    config = tool.get("config") or {}
    if not isinstance(config, Mapping):
        raise ToolConfigError(f"{location}.config is a {type(config).__name__}; it must be a mapping")
    kind = config.get("type", "native")
    if kind != "native" or "mcp" in tool:
        raise ToolConfigError(f"{location}.config.type={kind}: not supported; only native tools are")
    _timeout(config, location)
    try:
        check_class(tool["class_name"], folder)
        schema = tool.get("tool_schema")
        parsed = None if schema is None else OpenAIFunctionToolSchema.model_validate(schema)
    except UserClassError as error:
        raise ToolConfigError(f"{location}.class_name={error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ToolConfigError(f"{location}.tool_schema.{key}: {first['msg']}") from None
    if parsed is not None:
        _check_parameters(parsed, location)
    return ToolEntry(tool["class_name"], dict(config), parsed)


def _timeout(config: Mapping[str, Any], location: str) -> float:
    value = config.get("timeout", DEFAULT_TIMEOUT)
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 < value < math.inf:
        raise ToolConfigError(f"{location}.config.timeout={value}: must be a number of seconds above 0")
    return float(value)


def _check_names(names: list[str], path: str, key: str = KEY) -> None:
    try:
        check_unique(names, f"{key}={path}")
    except ValueError as error:
        raise ToolConfigError(str(error)) from error


def initialize_tools_from_config(path: str | None) -> list[BaseTool]:
    """Construct the tools of a file, in its order; return an empty list for None.

    Raises:
        ToolConfigError: as for `read_tool_config`; or a class does not import, is not a `BaseTool`, or its constructor
            fails.
    """
    if path is None:
        return []
    folder = expand_user(path).parent
    tools = []
    for i, entry in enumerate(read_tool_config(path)):
        location = f"{KEY}={path}: tools[{i}]"
        try:
            tool = load_class(entry.class_name, folder, BaseTool)(entry.config, entry.tool_schema)
        except UserClassError as error:
            raise ToolConfigError(f"{location}.class_name={error}") from error
        except (Exception, SystemExit) as error:  # a user's __init__ may raise anything
            raise ToolConfigError(f"{location}: {entry.class_name} cannot be constructed: {error}") from error
        _check_methods(tool, f"{location}: {entry.class_name}")
        _check_parameters(tool.tool_schema, location)
        tools.append(tool)
    _check_names([tool.name for tool in tools], path)
    return tools


def all_tools(tool_config_path: str | None, function_tool_path: str | None) -> list[BaseTool]:
    """Construct the tools of both keys.

    Raises:
        ToolConfigError: as for `initialize_tools_from_config`; or a function tool cannot be used, or has the name of
            another tool.
    """
    tools = initialize_tools_from_config(tool_config_path)
    try:
        tools += load_function_tools(function_tool_path)
    except ValueError as error:
        raise ToolConfigError(str(error)) from error
    if function_tool_path is not None:
        _check_names([tool.name for tool in tools], function_tool_path, FUNCTION_KEY)
    return tools


def _check_methods(tool: BaseTool, location: str) -> None:
    """Check that every method can be called with the arguments of a run, which would otherwise fail at each call.

    Raises:
        ToolConfigError: a method takes other arguments, or `execute` is not defined.
    """
    if getattr(tool.execute, "__func__", None) is BaseTool.execute:
        raise ToolConfigError(f"{location} does not define execute(self, instance_id, parameters, **kwargs)")
    calls: tuple[tuple[Callable[..., Any], str, tuple[Any, ...], dict[str, Any]], ...] = (
        (tool.create, "create(create_kwargs=...)", (), {"create_kwargs": {}}),
        (tool.execute, "execute(instance_id, parameters, agent_data=...)", ("", {}), {"agent_data": None}),
        (tool.calc_reward, "calc_reward(instance_id)", ("",), {}),
        (tool.release, "release(instance_id)", ("",), {}),
    )
    for method, form, args, kwargs in calls:
        try:
            inspect.signature(method).bind(*args, **kwargs)
        except TypeError as error:
            raise ToolConfigError(f"{location} cannot be called as {form}: {error}; let it take **kwargs") from None


def _check_parameters(schema: OpenAIFunctionToolSchema, location: str) -> None:
    """Check that the model can give every required argument.

    Raises:
        ToolConfigError: a required argument is not described, so the model would never give it.
    """
    parameters = schema.function.parameters
    unknown = [name for name in parameters.required if name not in parameters.properties]
    if unknown:
        raise ToolConfigError(
            f"{location}: the schema of {schema.function.name} requires {', '.join(unknown)}, which its properties do "
            f"not describe ({', '.join(parameters.properties) or 'none'}); correct required or properties"
        )


def tool_timeout(tool: BaseTool) -> float:
    """Return the time limit of one call of `tool` in seconds."""
    return _timeout(tool.config or {}, tool.name)
