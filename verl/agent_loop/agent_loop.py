"""The agent-loop protocol and its registry.

A loop turns one row into one sample: `async run(sampling_params, **row) -> AgentLoopOutput`. It exchanges only tokens
with the engine, and keeps the tokens of the model as they were generated.
"""

from __future__ import annotations

import asyncio
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from verl.config import PPOConfig
from verl.extension.registry import registered_name
from verl.extension.user_class import refuse_uncalled
from verl.utils.dataset.prompts import prompt_token_ids
from verl.utils.sampling_masks import SamplingMasks
from verl.workers.rollout.client import LLMServerClient
from verl.workers.rollout.types import TokenOutput


@dataclass
class AgentLoopOutput:
    """One sample.

    Attributes:
        prompt_ids: the tokens before the model's first token.
        response_ids: the tokens after the prompt, from the model and from tools or the environment.
        response_mask: 1 for tokens of the model, 0 for others; as long as `response_ids`.
        response_logprobs: log-probability of each response token, 0.0 if its mask is 0; empty if not requested.
        weight_versions: version of the weights that generated each response token, -1 if its mask is 0.
        sampling_masks: the tokens that each response token was sampled from, `SamplingMasks.full(1)` if its mask is 0;
            required with `rollout.replay_sampling_mask`, otherwise unused.
        stop_reason: `stop`, `length`, `abort`, or `turns` (the turn limit was reached).
        num_turns: number of messages, the prompt included.
        extra_fields: further columns of this sample: numbers, strings, lists and dicts. Samples without such a field
            get None. The reward function receives them in `extra_info`.
        metrics: numbers by name; a step logs `agent_loop/NAME/{min,max,mean}` over its samples.
        reward_score: the reward of the sample, finite; None: it is computed by the reward function.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    response_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    sampling_masks: SamplingMasks = field(default_factory=lambda: SamplingMasks.full(0))
    stop_reason: str = "stop"
    num_turns: int = 2
    extra_fields: dict[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    reward_score: float | None = None

    def __post_init__(self) -> None:
        # Loops of upstream verl give None for log-probabilities that were not requested.
        self.response_logprobs = self.response_logprobs or []


class _Server:
    """The replicas with the arguments of upstream verl's `server_manager`."""

    def __init__(self, client: LLMServerClient):
        self._client = client

    async def generate(
        self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **media: Any
    ) -> TokenOutput:
        """Generate one response; requests with one `request_id` go to the same replica.

        Raises:
            NotImplementedError: images, videos or audio.
        """
        if given := [name for name, value in media.items() if value]:
            raise NotImplementedError(f"generate: {', '.join(given)} are not supported yet; use text prompts")
        return await self._client.generate(prompt_ids, sampling_params, session=request_id)


class AgentLoopBase(ABC):
    """Base class of agent loops. A new object is made for each sample, so a loop may store state in attributes.

    A subclass that defines `__init__` takes these three arguments and passes them to `super().__init__`; further
    arguments are keywords.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        config: the whole config.

    Attributes:
        prompt_length, response_length: maximum length of `prompt_ids` and `response_ids`, in tokens.
        rollout_config: the section `actor_rollout_ref.rollout`.
        data_config: the section `data`.
        server_manager: the replicas as in upstream verl:
            `generate(request_id=..., prompt_ids=..., sampling_params=...)`.
        processor: None; for multi-modal models, which are not supported yet.
        loop: the running event loop.
    """

    uncalled_methods: ClassVar[Mapping[str, str]] = {
        "init_class": "rename it to setup(cls, tokenizer, config), which returns keywords for __init__",
    }

    def __init__(self, client: LLMServerClient, tokenizer: Any, config: PPOConfig):
        self.client = client
        self.tokenizer = tokenizer
        self.config = config
        self.rollout_config = config.actor_rollout_ref.rollout
        self.prompt_length = config.data.max_prompt_length
        self.response_length = config.data.max_response_length
        self.data_config = config.data
        self.server_manager = _Server(client)
        self.processor = None

    @functools.cached_property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    async def apply_chat_template(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **media: Any
    ) -> list[int]:
        """Return the tokens of messages, up to the start of the response.

        Args:
            messages: the conversation.
            tools: schemas of the tools to show.
            media: images, videos, audios: must be empty.

        Raises:
            NotImplementedError: images, videos or audio.
            ValueError: the chat template rejects the messages.
        """
        if given := [name for name, value in media.items() if value]:
            raise NotImplementedError(f"apply_chat_template: {', '.join(given)} are not supported; use text prompts")
        kwargs = {**(self.data_config.apply_chat_template_kwargs or {}), **({"tools": tools} if tools else {})}
        return prompt_token_ids(self.tokenizer, messages, kwargs)

    @classmethod
    def setup(cls, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        """Build the objects that all loops of this class share: keywords for `__init__`. Called once per run.

        Raises:
            ValueError: the loop does not support this config; raised before the engine starts.
        """
        return {}

    @abstractmethod
    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Generate one sample from one row of the dataset."""


@dataclass(frozen=True)
class RegisteredLoop:
    """A loop class and the keywords that it was registered with."""

    loop: type[AgentLoopBase]
    kwargs: Mapping[str, Any]

    def shared_arguments(self, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        """Return the keywords that all loops of a run get: those of `setup`, which is called, and of `register`."""
        return {**self.loop.setup(tokenizer, config), **self.kwargs}


_LOOPS: dict[str, RegisteredLoop] = {}


def register(name: str | Enum, **kwargs: Any) -> Callable[[type[AgentLoopBase]], type[AgentLoopBase]]:
    """Register a loop class (decorator) for `rollout.agent.default_agent_loop` and the column `agent_name`.

    Args:
        name: name of the loop.
        kwargs: further keywords for its `__init__`.

    Raises:
        TypeError: the name is neither text nor a member of an enum of texts, or the class is no `AgentLoopBase`.
        ValueError: another class has the name, or the class overrides a method that is never called.
    """
    name = registered_name(name, "agent loop")

    def add(loop: type[AgentLoopBase]) -> type[AgentLoopBase]:
        if not (isinstance(loop, type) and issubclass(loop, AgentLoopBase)):
            raise TypeError(f"agent loop {name!r}: {loop!r} must be a subclass of AgentLoopBase")
        refuse_uncalled(loop, AgentLoopBase)
        known = _LOOPS.get(name)
        if known is not None and known.loop.__qualname__ != loop.__qualname__:
            raise ValueError(f"duplicate agent loop name {name!r}: {known.loop} and {loop}; choose another name")
        _LOOPS[name] = RegisteredLoop(loop, kwargs)
        return loop

    return add


def get_agent_loop(name: str | Enum) -> RegisteredLoop:
    """Return the loop registered under `name`.

    Raises:
        ValueError: unknown name; the message lists the known names.
    """
    name = registered_name(name, "agent loop")
    if name not in _LOOPS:
        raise ValueError(f"unknown agent loop {name!r}; use one of {', '.join(agent_loop_names())}")
    return _LOOPS[name]


class LoopFactory:
    """Makes the agent loops of a run.

    Args:
        client: access to the replicas.
        tokenizer: the model's tokenizer.
        config: the whole config.

    Raises:
        ValueError: the default agent loop is unknown or does not support the config.
    """

    def __init__(self, client: LLMServerClient, tokenizer: Any, config: PPOConfig):
        self._arguments = client, tokenizer, config
        self._shared: dict[str, dict[str, Any]] = {}
        # Set up the default loop now, so that its errors show before the first sample.
        self.make(config.actor_rollout_ref.rollout.agent.default_agent_loop)

    def make(self, name: str) -> AgentLoopBase:
        """Return a new loop for one sample.

        Raises:
            ValueError: unknown name, or the loop does not support the config.
        """
        registered = get_agent_loop(name)
        if name not in self._shared:
            self._shared[name] = registered.shared_arguments(*self._arguments[1:])
        return registered.loop(*self._arguments, **self._shared[name])


def agent_loop_names() -> list[str]:
    """Return the names of the registered loops."""
    return sorted(_LOOPS)
