"""The agent-loop protocol and its registry.

A loop turns one row into one sample: `async run(sampling_params, **row) -> AgentLoopOutput`. It talks to the engine in
tokens only, and keeps the model's own tokens as they were generated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.config import PPOConfig
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
        stop_reason: `stop`, `length`, `abort`, or `turns` (a cap on turns).
        num_turns: messages exchanged, the prompt included.
        extra_fields: more columns for this sample, None for samples without them; the reward function finds them in
            `extra_info`. Numbers, strings, lists and dicts.
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

    A subclass with an `__init__` of its own takes these three, further ones by keyword, and hands the three on.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        config: the whole config.

    Attributes:
        prompt_length, response_length: caps on `prompt_ids` and `response_ids`, in tokens.
        rollout_config: the section `actor_rollout_ref.rollout`.
    """

    def __init__(self, client: LLMServerClient, tokenizer: Any, config: PPOConfig):
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self.rollout_config = config.actor_rollout_ref.rollout
        self.prompt_length = config.data.max_prompt_length
        self.response_length = config.data.max_response_length

    @classmethod
    def setup(cls, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        """What all loops of this class share, made once a run; every one is given it as keywords.

        Raises:
            ValueError: the loop cannot work with this config; said before the engine starts.
        """
        return {}

    @abstractmethod
    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Produce one sample from one row of the dataset."""


@dataclass(frozen=True)
class RegisteredLoop:
    """A class of loops and the keywords that it was registered with."""

    loop: type[AgentLoopBase]
    kwargs: Mapping[str, Any]


_LOOPS: dict[str, RegisteredLoop] = {}


def register(name: str, **kwargs: Any) -> Callable[[type[AgentLoopBase]], type[AgentLoopBase]]:
    """Class decorator: makes a loop available as `rollout.agent.default_agent_loop` or in the column `agent_name`.

    Args:
        kwargs: further keywords for its `__init__`.
    """

    def add(loop: type[AgentLoopBase]) -> type[AgentLoopBase]:
        known = _LOOPS.get(name)
        if known is not None and known.loop.__qualname__ != loop.__qualname__:
            raise ValueError(f"agent loop {name!r} is registered twice: {known.loop} and {loop}; choose another name")
        _LOOPS[name] = RegisteredLoop(loop, kwargs)
        return loop

    return add


def get_agent_loop(name: str) -> RegisteredLoop:
    """The loop registered under `name`.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _LOOPS:
        raise ValueError(f"agent loop {name!r} is not registered: use one of {', '.join(agent_loop_names())}")
    return _LOOPS[name]


def agent_loop_names() -> list[str]:
    """Names of the registered loops."""
    return sorted(_LOOPS)
