"""Functions as tools: schema from the docstring, calls, and errors."""

import inspect

import pytest

from verl.tools import ToolResponse, function_tool
from verl.tools.utils.tool_registry import ToolConfigError, all_tools

FILE = '''
from verl.tools.function_tool import function_tool

@function_tool
def add(a: int, b: int = 1) -> str:
    """Add two numbers.

    Args:
        a: the first number.
        b: the second number.
    """
    return str(a + b)

X = {"properties": {"x": {"type": "integer"}}, "required": ["x"]}

@function_tool("twice", schema={"function": {"name": "twice", "description": "Double.", "parameters": X}})
async def double(x):
    return x * 2, 0.5, {"calls": 1}
'''


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(function_tool._TOOLS, "_functions", dict(function_tool._TOOLS._functions))
    path = tmp_path / "tools.py"
    path.write_text(FILE)
    return path


async def result(tool, parameters):
    returned = tool.execute("id", parameters, agent_data=None)
    return await returned if inspect.isawaitable(returned) else returned


async def test_functions_of_a_file_are_tools(path):
    add, twice = all_tools(None, str(path))
    assert (add.name, twice.name) == ("add", "twice")
    function = add.tool_schema.function
    assert function.description == "Add two numbers." and function.parameters.required == ["a"]
    assert function.parameters.properties["b"].type == "integer"
    assert await result(add, {"a": 2, "b": 3}) == (ToolResponse(text="5"), None, {})
    assert await result(twice, {"x": 4}) == (ToolResponse(text="8"), 0.5, {"calls": 1})
    assert [tool.name for tool in all_tools(None, str(path))] == ["add", "twice"]
    assert not inspect.iscoroutinefunction(add.execute) and inspect.iscoroutinefunction(twice.execute)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", "has no function with the decorator @function_tool"),
        ("import absent_module", "does not import: ModuleNotFoundError"),
        (
            "from verl.tools.function_tool import function_tool\n@function_tool\ndef f(a): return a",
            "function tool 'f' has no schema: .*type hints and a docstring",
        ),
        (
            "from verl.tools.function_tool import function_tool\n@function_tool(schema={'function': {'name': ''}})\n"
            "def f(a): return a",
            r"function tool 'f': schema\.function\.name",
        ),
    ],
)
def test_files_that_cannot_be_used_are_errors(tmp_path, text, words):
    (tmp_path / "tools.py").write_text(text)
    with pytest.raises(ToolConfigError, match=words):
        all_tools(None, str(tmp_path / "tools.py"))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ToolConfigError, match=r"function_tool_path=.*absent\.py: no such file"):
        all_tools(None, str(tmp_path / "absent.py"))


@pytest.mark.parametrize(
    ("parameters", "function", "words"),
    [
        (
            {"properties": {"y": {"type": "integer"}}},
            "f(x=1)",
            "arguments of its schema (y): got an unexpected keyword",
        ),
        ({}, "f(x)", "arguments of its schema (none): missing a required argument: 'x'"),
        ({"properties": {"x": {"type": "integer"}}}, "f(x)", "arguments of its schema (none): missing a required"),
        ({"properties": {"x": {"type": "integer"}}, "required": ["x"]}, "f(x, y=1)", None),
        ({"properties": {"x": {"type": "integer"}}}, "f(**arguments)", None),
    ],
)
def test_the_schema_fits_the_function(path, parameters, function, words):
    schema = {"function": {"name": "f", "description": "d", "parameters": parameters}}
    head = "from verl.tools.function_tool import function_tool"
    path.write_text(f"{head}\n@function_tool(schema={schema!r})\ndef {function}:\n    return 1\n")
    if words is None:
        assert [tool.name for tool in all_tools(None, str(path))] == ["f"]
        return
    with pytest.raises(ToolConfigError) as raised:
        all_tools(None, str(path))
    assert f"{path}: function tool 'f' cannot be called" in str(raised.value) and words in str(raised.value)
