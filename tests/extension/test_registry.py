"""The registry class behind the estimators and the losses, and the names in every registry that users extend."""

from enum import Enum, StrEnum

import pytest

from verl.agent_loop import agent_loop
from verl.agent_loop.agent_loop import agent_loop_names, get_agent_loop
from verl.algorithms.advantages.common import ADV_ESTIMATORS
from verl.algorithms.losses.common import POLICY_LOSSES
from verl.config import names
from verl.extension.registry import Registry
from verl.tools import function_tool
from verl.trainer.ppo.core_algos import (
    AdvantageEstimator,
    get_adv_estimator_fn,
    get_policy_loss_fn,
    register_adv_est,
    register_policy_loss,
)
from verl.workers import reward_manager
from verl.workers.reward_manager import RewardManagerBase, get_reward_manager_cls
from verl.workers.reward_manager.registry import REWARD_MANAGERS


def test_unsupported_name_is_an_error_that_lists_the_registered_names():
    registry = Registry("thing", "some.key", unsupported=("later",))
    registry.register("a")(len)
    with pytest.raises(ValueError, match=r"some.key='later' is not supported yet: use one of a"):
        registry.get("later")


def test_duplicate_name_is_an_error():
    registry = Registry("thing", "some.key")

    def one():
        return 1

    def two():
        return 2

    registry.register("a")(one)
    registry.register("a")(one)
    with pytest.raises(ValueError, match=r"thing 'a' is already registered by .*one"):
        registry.register("a")(two)
    assert registry.get("a") is one
    assert registry.names() == ["a"]


class Name(Enum):
    PLAIN = "plain"
    NUMBER = 3


class TextName(StrEnum):
    TEXT = "text"


def function():
    """Do nothing."""


class Loop(agent_loop.AgentLoopBase):
    async def run(self, sampling_params, **row):
        return None


class Manager(RewardManagerBase):
    async def run_single(self, data):
        return {}


REGISTRIES = {
    "advantage estimator": (register_adv_est, get_adv_estimator_fn, ADV_ESTIMATORS.names, function),
    "policy loss": (register_policy_loss, get_policy_loss_fn, POLICY_LOSSES.names, function),
    "agent loop": (agent_loop.register, lambda name: get_agent_loop(name).loop, agent_loop_names, Loop),
    "reward manager": (reward_manager.register, get_reward_manager_cls, REWARD_MANAGERS.names, Manager),
    "function tool": (
        function_tool.function_tool,
        lambda name: function_tool.get_function_tool(name).function,
        function_tool._TOOLS.names,
        function,
    ),
}


@pytest.fixture(params=REGISTRIES)
def registry(request, monkeypatch):
    """Each registry that users extend, with its entries restored after the test: register, get, names, an entry."""
    for known in (ADV_ESTIMATORS, POLICY_LOSSES, REWARD_MANAGERS, function_tool._TOOLS):
        monkeypatch.setattr(known, "_functions", dict(known._functions))
    monkeypatch.setattr(agent_loop, "_LOOPS", dict(agent_loop._LOOPS))
    return REGISTRIES[request.param]


@pytest.mark.parametrize("name", [Name.PLAIN, TextName.TEXT])
def test_an_enum_member_registers_its_value(registry, name):
    register_name, get, names, entry = registry
    assert register_name(name)(entry) is entry
    assert get(name.value) is get(name) is entry
    assert name.value in names() and all(type(known) is str for known in names())
    with pytest.raises(ValueError, match="absent"):
        get("absent")


@pytest.mark.parametrize("name", [Name.NUMBER, 3, ""])
def test_a_name_that_is_not_a_string_is_refused(registry, name):
    register_name, _, names, entry = registry
    before = names()
    with pytest.raises(TypeError, match="must be text"):
        register_name(name)(entry)
    assert names() == before


def test_the_enum_of_estimators_lists_the_built_in_ones():
    assert {member.value for member in AdvantageEstimator} == set(names.ADV_ESTIMATORS)
    assert get_adv_estimator_fn(AdvantageEstimator.GRPO) is get_adv_estimator_fn("grpo")
