"""Read the YAML file of the user's agent loops (`rollout.agent.agent_loop_config_path`); imports no class of it.

- name: my_agent                           # for default_agent_loop and the column agent_name
  _target_: my_loops.MyAgentLoop           # or path/to/file.py:MyAgentLoop, relative to this file
  depth: 3                                 # further keyword arguments of its __init__
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl.extension.paths import expand_user
from verl.extension.user_class import UserClassError, check_class
from verl.extension.user_files import check_unique, read_yaml_list

AGENT_LOOPS_KEY = "actor_rollout_ref.rollout.agent.agent_loop_config_path"


class AgentLoopFileError(ValueError):
    """A file of agent loops cannot be used; the message contains the entry and the reason."""


@dataclass(frozen=True)
class AgentLoopEntry:
    """One agent loop of the file.

    Attributes:
        name: for `default_agent_loop` and the column `agent_name`.
        target: its class, as `package.module.Class` or `path/to/file.py:Class`.
        kwargs: keyword arguments of its `__init__`.
        location: key, file and index, for error messages.
    """

    name: str
    target: str
    kwargs: dict[str, Any]
    location: str


def read_agent_loops(path: str) -> list[AgentLoopEntry]:
    """Return the entries of a file of agent loops.

    Raises:
        AgentLoopFileError: the file is missing or not YAML, an entry is incomplete, a class does not exist, or two
            entries have the same name.
    """
    folder = expand_user(path).parent
    try:
        items = read_yaml_list(path, AGENT_LOOPS_KEY, entry="{name, _target_} for each agent loop")
        entries = [_entry(item, location, folder) for location, item in items]
        check_unique([entry.name for entry in entries], f"{AGENT_LOOPS_KEY}={path}")
    except ValueError as error:
        raise AgentLoopFileError(str(error)) from error
    return entries


def _entry(item: Any, location: str, folder: Path) -> AgentLoopEntry:
    name, target = (item.get("name"), item.get("_target_")) if isinstance(item, Mapping) else (None, None)
    if not isinstance(name, str) or not isinstance(target, str):
        raise ValueError(f"{location}: an entry needs name and _target_ (package.module.Class, or file.py:Class)")
    try:
        check_class(target, folder)
    except UserClassError as error:
        raise ValueError(f"{location}._target_={error}") from error
    kwargs = {key: value for key, value in item.items() if key not in ("name", "_target_")}
    return AgentLoopEntry(name, target, kwargs, location)
