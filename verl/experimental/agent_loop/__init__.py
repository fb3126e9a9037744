"""Agent loops, under upstream verl's path; `verl.agent_loop` has the implementation."""

from verl.agent_loop import AgentLoopBase, AgentLoopOutput, SingleTurnAgentLoop, ToolAgentLoop, register
from verl.extension.upstream_names import missing_names

__all__ = ["AgentLoopBase", "AgentLoopOutput", "SingleTurnAgentLoop", "ToolAgentLoop", "register"]
__getattr__ = missing_names(__name__)
