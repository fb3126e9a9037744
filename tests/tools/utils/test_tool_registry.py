"""The tool config file: the constructed tools, and the errors of invalid files."""

import textwrap

import pytest
import yaml

from fixtures import tools as fake
from fixtures.tools import schema, write_tool_config
from verl.tools.utils.tool_registry import (
    ToolConfigError,
    initialize_tools_from_config,
    read_tool_config,
    tool_timeout,
)

OWN = """
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema

class NoExecute(BaseTool):
    def get_openai_tool_schema(self):
        function = {"name": "from_class", "description": "d"}
        return OpenAIFunctionToolSchema.model_validate({"type": "function", "function": function})

class WithSchema(NoExecute):
    async def execute(self, instance_id, parameters, **kwargs):
        pass

class Narrow(WithSchema):
    async def execute(self, instance_id, parameters):
        pass

class NarrowCreate(WithSchema):
    async def create(self, instance_id):
        pass

class NarrowRelease(WithSchema):
    async def release(self):
        pass

class NarrowReward(WithSchema):
    async def calc_reward(self, instance_id, parameters):
        pass

class Unknown(WithSchema):
    def get_openai_tool_schema(self):
        function = {"name": "a", "description": "d", "parameters": {"required": ["query"]}}
        return OpenAIFunctionToolSchema.model_validate({"function": function})

class Breaks(WithSchema):
    def __init__(self, config, tool_schema):
        raise OSError("no key")

class NoTool:
    pass
"""


def test_a_file_gives_its_tools_in_order(tmp_path):
    path = write_tool_config(
        tmp_path / "tools.yaml",
        (fake.Echo, "echo", ["text"], {}),
        (fake.Hangs, "hangs", [], {"timeout": 2, "key": "k"}),
    )
    echo, hangs = initialize_tools_from_config(str(path))
    assert (echo.name, hangs.name) == ("echo", "hangs") and isinstance(hangs, fake.Hangs)
    assert hangs.config == {"type": "native", "timeout": 2, "key": "k"}
    assert (tool_timeout(echo), tool_timeout(hangs)) == (30.0, 2.0)
    # The schema for chat templates is exactly the one in the file.
    assert echo.tool_schema.model_dump(exclude_unset=True, exclude_none=True) == schema("echo", "text")
    assert initialize_tools_from_config(None) == []


def test_other_schema_keywords_are_kept(tmp_path):
    written = schema("search", "query", additionalProperties=True)
    written["function"]["parameters"]["properties"]["top"] = {"type": ["integer", "null"], "minimum": 1, "enum": [1, 2]}
    (tmp_path / "tools.yaml").write_text(
        yaml.safe_dump({"tools": [{"class_name": "fixtures.tools.Echo", "tool_schema": written}]})
    )
    (entry,) = read_tool_config(str(tmp_path / "tools.yaml"))
    assert entry.tool_schema.model_dump(exclude_unset=True, exclude_none=True) == written


def test_a_class_in_a_relative_file_may_define_its_schema(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "tools.yaml").write_text("tools: [{class_name: own.py:WithSchema}]")
    monkeypatch.chdir(tmp_path)
    (tool,) = initialize_tools_from_config(str(folder / "tools.yaml"))
    assert tool.name == "from_class"
    (again,) = initialize_tools_from_config(str(folder / "tools.yaml"))
    assert type(again) is type(tool)


SCHEMA = "tool_schema: {type: function, function: {name: a, description: d}}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no such file"),
        ("tools: [", "is not YAML"),
        ("[]", "must contain a list 'tools'"),
        ("tools: []", "must contain a list 'tools'"),
        ("tools: [{config: {}}]", r"tools\[0\] has no class_name"),
        (f"tools: [{{class_name: own.py:WithSchema, conf: 1, {SCHEMA}}}]", "unknown key conf"),
        ("tools: [{class_name: own.py:WithSchema, config: [1]}]", "config is a list"),
        ("tools: [{class_name: own.py:WithSchema, config: {type: mcp}}]", "type=mcp: not supported; only native"),
        ("tools: [{class_name: own.py:WithSchema, config: {timeout: 0}}]", "timeout=0: must be a number"),
        (
            "tools: [{class_name: own.py:WithSchema, config: {timeout: .inf}}]",
            "timeout=inf: must be a number",
        ),
        (
            "tools: [{class_name: own.py:WithSchema, config: {timeout: true}}]",
            "timeout=True: must be a number",
        ),
        ("tools: [{class_name: Own}]", "give package.module.Class, or path/to/file.py:Class"),
        ("tools: [{class_name: nobody_has_this.Own}]", "no module nobody_has_this"),
        ("tools: [{class_name: other.py:Own}]", "no such file"),
        ("tools: [{class_name: folder.py:Own}]", "folder.py:Own: is a directory"),
        ("tools: [{class_name: own.py:Own}]", "has no class Own; it has BaseTool, Breaks"),
        ("tools: [{class_name: broken.py:Own}]", "is not valid Python"),
        ("tools: [{class_name: own.py:WithSchema, tool_schema: {type: function}}]", "tool_schema.function: Field"),
        (
            "tools: [{class_name: own.py:WithSchema, tool_schema: {function: {name: a, description: d, "
            "parameters: {properties: {q: {type: string}}, required: [query]}}}}]",
            r"tools\[0\]: the schema of a requires query, which its properties do not describe \(q\)",
        ),
        (
            f"tools: [{{class_name: own.py:WithSchema, {SCHEMA}}}, {{class_name: own.py:WithSchema, {SCHEMA}}}]",
            "duplicate name a;",
        ),
    ],
)
def test_an_invalid_file_is_rejected_without_importing_classes(tmp_path, text, words):
    path = tmp_path / "tools.yaml"
    (tmp_path / "own.py").write_text(OWN + "raise SystemExit('imported')\n")
    (tmp_path / "broken.py").write_text("class Own(:\n")
    (tmp_path / "folder.py").mkdir()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ToolConfigError, match=words) as caught:
        read_tool_config(str(path))
    assert str(caught.value).startswith(f"actor_rollout_ref.rollout.multi_turn.tool_config_path={path}")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("class_name: own.py:NoTool", "not a subclass of verl.tools.base_tool.BaseTool"),
        ("class_name: fixtures.tools.Nobody", "Nobody does not exist"),
        ("class_name: fixtures.nowhere.Nobody", "does not import: ModuleNotFoundError"),
        ("class_name: fails.py:Own", "does not import: ZeroDivisionError"),
        ("class_name: own.py:Narrow", r"cannot be called as execute.*let it take \*\*kwargs"),
        ("class_name: own.py:NoExecute", r"does not define execute\(self, instance_id, parameters"),
        ("class_name: own.py:NarrowCreate", r"cannot be called as create\(create_kwargs"),
        ("class_name: own.py:NarrowRelease", r"cannot be called as release\(instance_id"),
        ("class_name: own.py:NarrowReward", r"cannot be called as calc_reward\(instance_id"),
        ("class_name: own.py:Unknown", "the schema of a requires query, which its properties do not describe"),
        ("class_name: own.py:Breaks", "cannot be constructed: no key"),
        ("class_name: fixtures.tools.Raises", "has no schema"),
    ],
)
def test_an_invalid_class_is_rejected_when_it_is_loaded(tmp_path, entry, words):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "fails.py").write_text("class Own: pass\n1 / 0\n")
    (tmp_path / "tools.yaml").write_text(f"tools:\n{textwrap.indent('- ' + entry, '  ')}\n")
    with pytest.raises(ToolConfigError, match=words):
        initialize_tools_from_config(str(tmp_path / "tools.yaml"))


def test_two_classes_with_the_same_tool_name_are_rejected(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "tools.yaml").write_text("tools: [{class_name: own.py:WithSchema}, {class_name: own.py:WithSchema}]")
    with pytest.raises(ToolConfigError, match="duplicate name from_class"):
        initialize_tools_from_config(str(tmp_path / "tools.yaml"))
