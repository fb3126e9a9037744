"""The probe of agent loops and tools: they are constructed, and no loop or tool runs."""

import textwrap

import pytest

from fixtures.script import row

LOOP = """
from verl.agent_loop import AgentLoopBase, AgentLoopOutput
class Mine(AgentLoopBase):
    def __init__(self, client, tokenizer, config, *, hint="a"):
        super().__init__(client, tokenizer, config)
        self.hint = tokenizer.encode(hint), config.data.max_prompt_length, client.generate
    async def run(self, sampling_params, **row):
        raise SystemExit("run was called")
"""
TOOL = """
from verl.tools import BaseTool
class Mine(BaseTool):
    async def execute(self, instance_id, parameters, **kwargs):
        raise SystemExit("execute was called")
"""
SCHEMA = "tool_schema: {function: {name: search, description: d}}"


@pytest.fixture
def loop(run):
    """Return a function that writes a loop and returns the findings of the probe."""
    count = iter(range(9))

    def call(source, entry="", name=None):
        name = name or f"probed_{run.root.name}_{next(count)}"
        run.write("my_loop.py", source)
        path = run.write("loops.yaml", f"- name: {name}\n  _target_: my_loop.py:Mine\n  {entry}\n")
        run.keys["actor_rollout_ref.rollout.agent.agent_loop_config_path"] = path
        return run.probe("agent")

    return call


@pytest.fixture
def tool(run):
    """Return a function that writes a tool and returns the findings of the probe."""

    def call(source, entry=SCHEMA):
        run.write("my_tool.py", source)
        path = run.write("tools.yaml", f"tools:\n- class_name: my_tool.py:Mine\n{textwrap.indent(entry, '  ')}\n")
        run.keys["actor_rollout_ref.rollout.multi_turn.tool_config_path"] = path
        return run.probe("agent")

    return call


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    from verl.agent_loop import agent_loop

    monkeypatch.setattr(agent_loop, "_LOOPS", dict(agent_loop._LOOPS))


def test_a_right_loop_is_constructed_and_not_run(loop):
    found = loop(LOOP, "hint: word")
    assert found.problems == []
    assert any("agent loop probed_" in text and "its constructor" in text for text in found.of("step"))


@pytest.mark.parametrize(
    ("source", "entry", "words"),
    [
        (LOOP, "hnit: word", "TypeError: Mine.__init__() got an unexpected keyword argument 'hnit'"),
        (LOOP.replace('hint="a"', "hint"), "", "missing 1 required keyword-only argument: 'hint'"),
        (LOOP.replace("client, tokenizer, config, *", "trainer_config, *"), "", "TypeError: Mine.__init__() takes"),
        (LOOP.replace("max_prompt_length", "max_promt_length"), "", "AttributeError: "),
        (LOOP.replace("**row", "raw_prompt"), "", "run cannot be called with "),
        (LOOP.replace("async def run", "async def go"), "", "TypeError: Can't instantiate abstract class Mine"),
        (LOOP.replace("(AgentLoopBase)", ""), "", "is not a subclass of verl.agent_loop.agent_loop.AgentLoopBase"),
        (LOOP + "    def init_class(self): pass\n", "", "init_class: rename it to setup(cls, tokenizer, config)"),
        (LOOP + "    @classmethod\n    def setup(cls):\n        return {}\n", "", "setup raised TypeError"),
        (LOOP + "    @classmethod\n    def setup(cls, *_):\n        return {'x': 1}\n", "", "keyword argument 'x'"),
        ("1 / 0\n" + LOOP, "", "does not import: ZeroDivisionError"),
    ],
)
def test_a_loop_that_cannot_be_used_is_an_error(loop, source, entry, words):
    found = loop(source, entry)
    assert [name for name, _ in found.problems] == ["error"], found.problems
    (text,) = found.of("error")
    assert words in text and ("my_loop.py" in text or "loops.yaml" in text)


def test_a_loop_whose_service_does_not_run_is_a_warning(loop):
    setup = "    @classmethod\n    def setup(cls, *_):\n        raise ConnectionError('no service')\n"
    found = loop(LOOP + setup)
    assert found.of("error") == [] and "ConnectionError: no service" in found.of("warning")[0]


def test_a_plain_run_may_return_an_awaitable(loop):
    found = loop(LOOP.replace("async def", "def"))
    assert found.of("error") == [] and "a run awaits its result" in found.of("warning")[0]


def test_an_unknown_loop_of_a_row_is_an_error(loop, run):
    run.script.rows([row(agent_name="ask_once")] * 4)
    found = loop(LOOP, name="ask_again")
    (text,) = found.of("error")
    assert "agent_name of the data has 'ask_once'" in text and "ask_again" in text


def test_a_right_tool_is_constructed_and_not_called(tool):
    assert tool(TOOL).problems == []


@pytest.mark.parametrize(
    ("source", "entry", "words"),
    [
        (TOOL, "config: {}", "Mine cannot be constructed: Mine has no schema"),
        (TOOL, "tool_schema: {function: {name: search}}", "tool_schema.function.description: Field required"),
        (TOOL, SCHEMA.replace("d}", "d, parameters: {required: [q]}}"), "requires q, which its properties do not"),
        (
            TOOL.replace(", **kwargs", ""),
            SCHEMA,
            "cannot be called as execute(instance_id, parameters, agent_data=...)",
        ),
        (TOOL.replace("execute", "call"), SCHEMA, "does not define execute"),
        (TOOL + "    def release(self):\n        pass\n", SCHEMA, "cannot be called as release(instance_id)"),
        (TOOL + "    def __init__(self, config):\n        pass\n", SCHEMA, "cannot be constructed: Mine.__init__()"),
        (TOOL.replace("(BaseTool)", ""), SCHEMA, "is not a subclass of verl.tools.base_tool.BaseTool"),
    ],
)
def test_a_tool_that_cannot_be_used_is_an_error(tool, source, entry, words):
    found = tool(source, entry)
    assert [name for name, _ in found.problems] == ["error"]
    assert words in found.of("error")[0] and "tools.yaml" in found.of("error")[0]


def test_a_tool_whose_service_does_not_run_is_a_warning(tool):
    found = tool(TOOL + "    def __init__(self, *_):\n        raise ConnectionError('no service')\n")
    assert found.of("error") == [] and "cannot be constructed: no service" in found.of("warning")[0]
