"""Checks of `actor_rollout_ref.rollout.agent` and `.multi_turn`, without importing the user's classes."""

from __future__ import annotations

import sys

from verl.config import names
from verl.config.agent_loops_file import AGENT_LOOPS_KEY, AgentLoopFileError, read_agent_loops
from verl.config.errors import unknown_value
from verl.config.ppo import PPOConfig
from verl.extension.user_files import file_problem
from verl.preflight.checks.data import columns_of_all
from verl.preflight.findings import Findings
from verl.tools.utils.tool_registry import ToolConfigError, read_tool_config

_DEFAULT_KEY = "actor_rollout_ref.rollout.agent.default_agent_loop"
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
_REGISTRY = "verl.agent_loop.agent_loop"


def check_agent(config: PPOConfig, found: Findings) -> None:
    """Check that the default agent loop exists, and that the files of agent loops and tools can be used."""
    agent = config.actor_rollout_ref.rollout.agent
    known = {*names.AGENT_LOOPS, *_registered()}
    if agent.agent_loop_config_path is not None:
        try:
            known |= {entry.name for entry in read_agent_loops(agent.agent_loop_config_path)}
        except AgentLoopFileError as error:
            found.errors.append(str(error))
            return
    default = agent.default_agent_loop
    if default not in known:
        found.errors.append(
            f"{_DEFAULT_KEY}={default}: {unknown_value(default, sorted(known))}, or give the file of your agent loop "
            f"in {AGENT_LOOPS_KEY}"
        )
    _check_multi_turn(config, found)


def agent_name_problem(config: PPOConfig, name: object) -> str | None:
    """Return why a row cannot have this value in its column agent_name; None if it can, or if it is not known.

    Files of agent loops and tools may register further names when they are imported.
    """
    if name is None:
        return None
    if not isinstance(name, str):
        return f"'agent_name' is a {type(name).__name__}; it must be the name of an agent loop"
    rollout = config.actor_rollout_ref.rollout
    tools = rollout.multi_turn.tool_config_path, rollout.multi_turn.function_tool_path
    known = {*names.AGENT_LOOPS, *_registered(), rollout.agent.default_agent_loop}
    if name in known or rollout.agent.agent_loop_config_path is not None or any(tools):
        return None
    return (
        f"'agent_name': {unknown_value(name, sorted(known))}, or give the file of your agent loop in {AGENT_LOOPS_KEY}"
    )


def _registered() -> list[str]:
    # The registry imports torch. If it is not imported yet, no user module has registered a loop.
    return list(sys.modules[_REGISTRY].agent_loop_names()) if _REGISTRY in sys.modules else []


def _check_multi_turn(config: PPOConfig, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    multi_turn, default = rollout.multi_turn, rollout.agent.default_agent_loop
    if multi_turn.tool_config_path is not None:
        try:
            read_tool_config(multi_turn.tool_config_path)
        except ToolConfigError as error:
            found.errors.append(str(error))
    if multi_turn.function_tool_path is not None and (problem := file_problem(multi_turn.function_tool_path)):
        found.errors.append(
            f"{_MULTI_TURN}.function_tool_path={multi_turn.function_tool_path}: {problem}; give a Python file"
        )
    if multi_turn.enable and default == "single_turn_agent" and not rows_choose_loop(config):
        found.errors.append(
            f"{_MULTI_TURN}.enable=True with {_DEFAULT_KEY}={default}: every sample would have one turn, because "
            f"data.train_files has no column agent_name; set {_DEFAULT_KEY}=tool_agent"
        )
    if default == "tool_agent" and multi_turn.tool_config_path is None and multi_turn.function_tool_path is None:
        found.warnings.append(
            f"{_DEFAULT_KEY}=tool_agent has no tools, so every tool call returns an error; set "
            f"{_MULTI_TURN}.tool_config_path or {_MULTI_TURN}.function_tool_path"
        )
    if default == "tool_agent" and not multi_turn.enable:
        found.notes.append("no effect with agent.default_agent_loop=tool_agent: rollout.multi_turn.enable=False")


def rows_choose_loop(config: PPOConfig) -> bool:
    """Return True if rows of the data can name their own agent loop."""
    data = config.data
    return bool(data.custom_cls.path) or "agent_name" in columns_of_all(data.train_files)
