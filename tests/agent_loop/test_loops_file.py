"""User agent loops from a YAML file: keywords, shared objects, and errors."""

import pytest

from verl.agent_loop.agent_loop import agent_loop_names, get_agent_loop, register
from verl.agent_loop.generation import SampleGenerator
from verl.agent_loop.loops_file import register_from_file
from verl.config import PPOConfig, names

OWN = """
from verl.agent_loop import AgentLoopBase, AgentLoopOutput, register

class Repeat(AgentLoopBase):
    setups = 0

    def __init__(self, client, tokenizer, config, *, times, word):
        super().__init__(client, tokenizer, config)
        self.times, self.word = times, word

    @classmethod
    def setup(cls, tokenizer, config):
        cls.setups += 1
        return {"word": 9, "times": 1}

    async def run(self, sampling_params, **row):
        ids = [self.word] * self.times
        return AgentLoopOutput([1], ids, [1] * len(ids))

class NoLoop:
    pass
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)

    def write(text):
        path = tmp_path / "loops.yaml"
        path.write_text(text)
        return str(path)

    return write


def generator(path, default):
    config = PPOConfig()
    agent = config.actor_rollout_ref.rollout.agent
    agent.agent_loop_config_path, agent.default_agent_loop = path, default
    return SampleGenerator(None, None, None, config)


def test_the_loops_of_the_config_are_registered():
    assert set(names.AGENT_LOOPS) <= set(agent_loop_names())


async def test_a_loop_from_a_file_gets_its_shared_objects_and_keywords(file):
    path = file("- {name: repeat_in_test, _target_: own.py:Repeat, times: 3}")
    samples = generator(path, "repeat_in_test")
    for _ in range(3):
        loop = samples._loops.make("repeat_in_test")
        assert (await loop.run({})).response_ids == [9, 9, 9]
    assert type(loop).setups == 1
    assert loop.response_length == PPOConfig().data.max_response_length
    register_from_file(path)  # registering again does nothing


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "- {name: mine_in_test, _target_: own.py:NoLoop}",
            "not a subclass of verl.agent_loop.agent_loop.AgentLoopBase",
        ),
        ("- {name: tool_agent, _target_: own.py:Repeat}", "duplicate name, another loop has it"),
        ("- {name: mine_in_test, _target_: own.py:Nobody}", "has no class Nobody"),
        ("- {name: mine_in_test}", "needs name and _target_"),
    ],
)
def test_a_loop_that_cannot_be_loaded_is_reported_with_its_entry(file, text, words):
    path = file(text)
    with pytest.raises(ValueError, match=words) as caught:
        generator(path, "single_turn_agent")
    assert str(caught.value).startswith(f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}: [0]")


def test_an_unknown_default_loop_is_rejected():
    with pytest.raises(ValueError, match=r"unknown agent loop 'nobody'; use one of .*single_turn_agent"):
        generator(None, "nobody")


def test_a_duplicate_name_is_rejected():
    with pytest.raises(ValueError, match="duplicate agent loop name"):

        @register("tool_agent")
        class Other(get_agent_loop("single_turn_agent").loop):
            pass
