"""Agent loops from a YAML file (`rollout.agent.agent_loop_config_path`).

- name: my_agent                           # value of default_agent_loop and of the column agent_name
  _target_: my_loops.MyAgentLoop           # or path/to/file.py:MyAgentLoop, relative to this file
  depth: 3                                 # further keywords of its __init__
"""

from __future__ import annotations

from verl.agent_loop.agent_loop import AgentLoopBase, agent_loop_names, get_agent_loop, register
from verl.config.agent_loops_file import AgentLoopFileError, read_agent_loops
from verl.extension.paths import expand_user
from verl.extension.user_class import UserClassError, load_class


def register_from_file(path: str) -> None:
    """Register every loop of the file.

    Raises:
        AgentLoopFileError: as for `read_agent_loops`; or a class does not import, is not an `AgentLoopBase`, or has the
            name of another loop.
    """
    folder = expand_user(path).parent
    for entry in read_agent_loops(path):
        try:
            loop = load_class(entry.target, folder, AgentLoopBase)
        except UserClassError as error:
            raise AgentLoopFileError(f"{entry.location}._target_={error}") from error
        # The module may already have registered its class; the file adds the keywords.
        if entry.name in agent_loop_names() and get_agent_loop(entry.name).loop is not loop:
            raise AgentLoopFileError(
                f"{entry.location}.name={entry.name}: duplicate name, another loop has it; choose another name"
            )
        register(entry.name, **entry.kwargs)(loop)
