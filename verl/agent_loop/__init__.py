"""Agent loops: turn one row of data into a generated, scored sample."""

from verl.agent_loop.agent_data import AgentData
from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, get_agent_loop, register
from verl.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.utils.sampling_masks import SamplingMasks

__all__ = [
    "AgentData",
    "AgentLoopBase",
    "AgentLoopOutput",
    "SamplingMasks",
    "SingleTurnAgentLoop",
    "ToolAgentLoop",
    "get_agent_loop",
    "register",
]
