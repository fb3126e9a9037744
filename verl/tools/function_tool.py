"""`@function_tool`: a Python function as a tool, selected by `rollout.multi_turn.function_tool_path`.

@function_tool
def add(a: int, b: int) -> int:
    \"\"\"Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    \"\"\"
    return a + b
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, overload

from pydantic import ValidationError

from verl.extension.registry import Registry, registered_name
from verl.extension.user_files import file_problem, import_file
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse

KEY = "actor_rollout_ref.rollout.multi_turn.function_tool_path"
F = TypeVar("F", bound=Callable[..., Any])
_TOOLS = Registry("function tool", KEY)
_SCHEMAS: dict[str, OpenAIFunctionToolSchema] = {}


class FunctionTool(BaseTool):
    """A tool that calls a function with the model's arguments as keywords.

    Args:
        function: plain or `async def`; a plain function runs in its own thread. It returns text, a `ToolResponse`, or
            a tuple (response, reward) or (response, reward, metrics); any other value is shown as its `str`.
        tool_schema: the description for the model.
    """

    def __init__(self, function: Callable[..., Any], tool_schema: OpenAIFunctionToolSchema):
        super().__init__({}, tool_schema)
        self.function = function
        if not inspect.iscoroutinefunction(function):
            self.execute = self._execute_in_thread  # type: ignore[method-assign,assignment]

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return _tool_return(await self.function(**parameters))

    def _execute_in_thread(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        return _tool_return(self.function(**parameters))


def _tool_return(value: Any) -> tuple[ToolResponse, float | None, dict[str, Any]]:
    response, reward, metrics = (*value, None, {})[:3] if isinstance(value, tuple) else (value, None, {})
    if len(value) > 3 if isinstance(value, tuple) else False:
        raise ValueError(f"a function tool returned {len(value)} values; return (response, reward, metrics)")
    if not isinstance(response, ToolResponse):
        response = ToolResponse(text=response if isinstance(response, str | None) else str(response))
    return response, reward, metrics if isinstance(metrics, dict) else {}


@overload
def function_tool(name: F) -> F: ...


@overload
def function_tool(
    name: str | Enum | None = None, *, schema: OpenAIFunctionToolSchema | Mapping[str, Any] | None = None
) -> Callable[[F], F]: ...


def function_tool(name: Any = None, *, schema: OpenAIFunctionToolSchema | Mapping[str, Any] | None = None) -> Any:
    """Register a function as a tool (decorator, with or without arguments).

    Args:
        name: name of the tool; default: that of the function.
        schema: the description for the model; default: from the type hints and the docstring, whose `Args:` must
            describe every parameter.

    Raises:
        TypeError: the name is neither text nor a member of an enum of texts.
        ValueError: another function has the name, or the schema is invalid or cannot be made.
    """
    if callable(name) and not isinstance(name, Enum):
        return function_tool()(name)

    def add(function: F) -> F:
        text = registered_name(function.__name__ if name is None else name, "function tool")
        made = _schema(function, text, schema)
        _TOOLS.register(text)(function)
        _SCHEMAS[text] = made
        return function

    return add


def _schema(
    function: Callable[..., Any], name: str, given: OpenAIFunctionToolSchema | Mapping[str, Any] | None
) -> OpenAIFunctionToolSchema:
    if isinstance(given, OpenAIFunctionToolSchema):
        return given
    try:
        if given is None:
            from transformers.utils import get_json_schema

            given = get_json_schema(function)
            given["function"]["name"] = name
        return OpenAIFunctionToolSchema.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"function tool {name!r}: schema.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except Exception as error:  # transformers has several classes of errors for docstrings and type hints
        raise ValueError(
            f"function tool {name!r} has no schema: {error}; add type hints and a docstring with Args:, or pass schema="
        ) from error


def get_function_tool(name: str | Enum) -> FunctionTool:
    """Return the tool registered under `name`.

    Raises:
        ValueError: no function has that name; the message lists the registered names.
    """
    function = _TOOLS.get(name)
    return FunctionTool(function, _SCHEMAS[registered_name(name, "function tool")])


def load_function_tools(path: str | None) -> list[FunctionTool]:
    """Import a Python file and return the tools that it registers; return an empty list for None.

    Raises:
        ValueError: the file does not exist or does not import, or it registers no tool.
    """
    if path is None:
        return []
    problem = file_problem(path)
    if problem is not None:
        raise ValueError(f"{KEY}={path}: {problem}; give a Python file")
    try:
        module = import_file(Path(path))
    except (Exception, SystemExit) as error:  # a user's file may raise any error
        raise ValueError(f"{KEY}={path} does not import: {type(error).__name__}: {error}") from error
    # By module, because a file is imported only once in a process.
    names = [name for name in _TOOLS.names() if _TOOLS.get(name).__module__ == module.__name__]
    if not names:
        raise ValueError(f"{KEY}={path}: has no function with the decorator @function_tool; add it")
    tools = [get_function_tool(name) for name in names]
    for tool in tools:
        _check_arguments(tool, f"{KEY}={path}: function tool {tool.name!r}")
    return tools


def _check_arguments(tool: FunctionTool, location: str) -> None:
    """Check that the function takes the arguments of its schema; ValueError if not.

    A schema that is given to `@function_tool` may differ from the function, and each call would fail.
    """
    parameters = tool.tool_schema.function.parameters
    for names in (parameters.properties, parameters.required):
        try:
            inspect.signature(tool.function).bind(**dict.fromkeys(names))
        except TypeError as error:
            raise ValueError(
                f"{location} cannot be called with the arguments of its schema ({', '.join(names) or 'none'}): "
                f"{error}; correct the schema, or the parameters of the function"
            ) from None
