"""Agent loops and tools: known, and their files are there and whole. No class of the user's is imported."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.config import names
from verl.config.ppo import PPOConfig
from verl.preflight.checks.data import column_names
from verl.preflight.findings import Findings
from verl.tools.utils.tool_registry import ToolConfigError, read_tool_config
from verl.utils.user_class import UserClassError, check_class
from verl.utils.user_files import read_yaml

LOOPS_KEY = "actor_rollout_ref.rollout.agent.agent_loop_config_path"
_DEFAULT_KEY = "actor_rollout_ref.rollout.agent.default_agent_loop"
_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
_REGISTRY = "verl.agent_loop.agent_loop"


class AgentLoopFileError(ValueError):
    """A file of agent loops cannot be used; the message says which entry and why."""


@dataclass(frozen=True)
class AgentLoopEntry:
    """One loop of the file: its name, its class, and keywords of its `__init__`."""

    name: str
    target: str
    kwargs: dict[str, Any]


def check_agent(config: PPOConfig, found: Findings) -> None:
    """Look for what the samples are made with."""
    rollout = config.actor_rollout_ref.rollout
    known = {*names.AGENT_LOOPS, *_registered()}
    if rollout.agent.agent_loop_config_path is not None:
        try:
            known |= {entry.name for entry in read_agent_loops(rollout.agent.agent_loop_config_path)}
        except AgentLoopFileError as error:
            found.errors.append(str(error))
            return
    default = rollout.agent.default_agent_loop
    if default not in known:
        near = difflib.get_close_matches(default, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        found.errors.append(
            f"{_DEFAULT_KEY}={default} is unknown{hint}: use one of {', '.join(sorted(known))}, or name the file of "
            f"your own loop in {LOOPS_KEY}"
        )
    _check_multi_turn(config, found)


def read_agent_loops(path: str) -> list[AgentLoopEntry]:
    """The entries of a file of agent loops; imports none of the classes.

    Raises:
        AgentLoopFileError: no such file, not YAML, or an entry that cannot work.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise AgentLoopFileError(f"{LOOPS_KEY}={path}: {error}") from error
    if not isinstance(content, list) or not content:
        raise AgentLoopFileError(f"{LOOPS_KEY}={path}: is no list; write one entry {{name, _target_}} for each loop")
    folder = Path(path).expanduser().parent
    entries = [_entry(item, f"{LOOPS_KEY}={path}: [{i}]", folder) for i, item in enumerate(content)]
    given = [entry.name for entry in entries]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise AgentLoopFileError(f"{LOOPS_KEY}={path}: {', '.join(twice)} is there twice; give each loop its own name")
    return entries


def _entry(item: Any, where: str, folder: Path) -> AgentLoopEntry:
    name, target = (item.get("name"), item.get("_target_")) if isinstance(item, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(target, str):
        raise AgentLoopFileError(f"{where}: an entry needs name and _target_ (package.module.Class, or file.py:Class)")
    try:
        check_class(target, folder)
    except UserClassError as error:
        raise AgentLoopFileError(f"{where}._target_={error}") from error
    return AgentLoopEntry(name, target, {key: value for key, value in item.items() if key not in ("name", "_target_")})


def _registered() -> list[str]:
    # The registry needs torch; nobody has registered anything if it was never imported. A user's modules are by now.
    return sys.modules[_REGISTRY].agent_loop_names() if _REGISTRY in sys.modules else []


def _check_multi_turn(config: PPOConfig, found: Findings) -> None:
    rollout = config.actor_rollout_ref.rollout
    multi_turn, default = rollout.multi_turn, rollout.agent.default_agent_loop
    if multi_turn.tool_config_path is not None:
        try:
            read_tool_config(multi_turn.tool_config_path)
        except ToolConfigError as error:
            found.errors.append(str(error))
    by_row = rows_choose_loop(config)
    if multi_turn.enable and default == "single_turn_agent" and not by_row:
        found.errors.append(
            f"{_MULTI_TURN}.enable=True, and every row would be answered in one turn ({_DEFAULT_KEY}={default}, and "
            f"data.train_files has no column agent_name): set {_DEFAULT_KEY}=tool_agent"
        )
    if default == "tool_agent" and multi_turn.tool_config_path is None:
        found.warnings.append(
            f"{_DEFAULT_KEY}=tool_agent has no tools: every call is answered by an error; set "
            f"{_MULTI_TURN}.tool_config_path"
        )
    if default == "tool_agent" and not multi_turn.enable:
        found.notes.append("no effect with agent.default_agent_loop=tool_agent: rollout.multi_turn.enable=False")


def rows_choose_loop(config: PPOConfig) -> bool:
    """Whether rows may name an agent loop of their own."""
    data = config.data
    return bool(data.custom_cls.path) or "agent_name" in column_names(data.train_files)
