"""The agent-loop protocol and its registry.

A loop turns one row into one sample: `async run(sampling_params, **row) -> AgentLoopOutput`. It talks to the engine in
tokens only, and keeps the model's own tokens as they were generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from verl.workers.rollout.client import LLMServerClient


@dataclass
class AgentLoopOutput:
    """One sample.

    Attributes:
        prompt_ids: tokens before the model's first one.
        response_ids: tokens after, the model's own and those of tools or the environment.
        response_mask: 1 for the model's own tokens, 0 for others; as long as `response_ids`.
        response_logprobs: log-probability of each response token, 0.0 where the mask is 0; empty where not asked for.
        weight_versions: version of the weights that made each response token, -1 where the mask is 0.
        stop_reason: `stop`, `length` or `abort`.
        num_turns: messages exchanged, the prompt included.
        extra_fields: more columns for this sample.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    response_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    stop_reason: str = "stop"
    num_turns: int = 2
    extra_fields: dict[str, Any] = field(default_factory=dict)


class AgentLoopBase(ABC):
    """One loop per sample; it may keep state on itself.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        response_length: cap on `response_ids`, in tokens.
    """

    def __init__(self, client: LLMServerClient, tokenizer: Any, response_length: int):
        self.client = client
        self.tokenizer = tokenizer
        self.response_length = response_length

    @abstractmethod
    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Produce one sample from one row of the dataset."""


_LOOPS: dict[str, type[AgentLoopBase]] = {}


def register(name: str) -> Callable[[type[AgentLoopBase]], type[AgentLoopBase]]:
    """Class decorator: makes a loop available as `rollout.agent.default_agent_loop` or in the column `agent_name`."""

    def add(loop: type[AgentLoopBase]) -> type[AgentLoopBase]:
        if name in _LOOPS and _LOOPS[name].__qualname__ != loop.__qualname__:
            raise ValueError(f"agent loop {name!r} is registered twice: {_LOOPS[name]} and {loop}; choose another name")
        _LOOPS[name] = loop
        return loop

    return add


def get_agent_loop(name: str) -> type[AgentLoopBase]:
    """The loop registered under `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _LOOPS:
        raise ValueError(f"agent loop {name!r} is not registered: use one of {sorted(_LOOPS)}")
    return _LOOPS[name]
