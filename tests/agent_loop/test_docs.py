"""The code blocks of docs/agent_loops.md run unchanged."""

import re
from pathlib import Path

import pytest

from fixtures.chat import HERMES, ScriptedClient, byte_tokenizer
from verl.agent_loop.generation import SampleGenerator
from verl.config import PPOConfig
from verl.tools.utils.tool_registry import initialize_tools_from_config

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "agent_loops.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """A directory with every code block, stored under the file name in its first line."""
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", TEXT, re.DOTALL):
        name = re.match(r"# (\w+\.(?:py|yaml))", block)
        assert name is not None, block
        (tmp_path / name[1]).write_text(block)
    return tmp_path


async def test_the_agent_loop_of_the_guide_runs(folder):
    tokenizer = byte_tokenizer(HERMES)
    config = PPOConfig()
    config.data.max_response_length = 64
    agent = config.actor_rollout_ref.rollout.agent
    agent.agent_loop_config_path, agent.default_agent_loop = str(folder / "loops.yaml"), "ask_twice"
    client = ScriptedClient([[11, 12], [13]])
    loop = SampleGenerator(client, tokenizer, None, config)._loops.make("ask_twice")
    output = await loop.run({}, prompt_token_ids=[5, 6], uid="1.0")
    hint = tokenizer.encode("Are you sure?", add_special_tokens=False)
    assert output.response_ids == [11, 12, *hint, 13]
    assert output.response_mask == [1, 1, *[0] * len(hint), 1]
    assert len(output.response_logprobs) == len(output.weight_versions) == len(output.response_ids)
    assert client.requests[1][0] == [5, 6, 11, 12, *hint]


def test_the_tool_of_the_guide_is_constructed(folder):
    (tool,) = initialize_tools_from_config(str(folder / "tools.yaml"))
    assert tool.name == "search" and tool.tool_schema.function.parameters.required == ["query"]


def test_every_failure_kind_and_every_key_is_documented():
    import dataclasses

    from verl.agent_loop.metrics import FAILURES
    from verl.config.rollout import MultiTurnConfig

    assert all(f"| `{kind}` |" in TEXT for kind in FAILURES)
    keys = {field.name for field in dataclasses.fields(MultiTurnConfig)} - {"interaction_config_path"}
    assert all(f"`{key}`" in TEXT or f"multi_turn.{key}" in TEXT for key in keys)
