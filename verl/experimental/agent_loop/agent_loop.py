"""Agent loops, under upstream verl's path; `verl.agent_loop` has the implementation."""

from verl.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.extension.upstream_names import missing_names

__all__ = ["AgentLoopBase", "AgentLoopMetrics", "AgentLoopOutput", "register"]
__getattr__ = missing_names(__name__)

AgentLoopMetrics = dict
"""Numbers by name: `AgentLoopMetrics(generate_sequences=1.5)`."""
