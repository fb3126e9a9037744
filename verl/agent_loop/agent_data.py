"""The state of one sample in the tool loop, which tools receive with every call."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.sampling_masks import SamplingMasks
from verl.workers.rollout.types import TokenOutput


@dataclass
class AgentData:
    """The sample so far; tools receive it as `agent_data`.

    Attributes:
        messages: the conversation, tool responses included.
        tools_kwargs: the row's `extra_info.tools_kwargs`.
        request_id: identifies the sample; the same for all of its turns.
        prompt_ids: the tokens before the model's first token.
        response_ids, response_mask, response_logprobs, weight_versions, sampling_masks: as in `AgentLoopOutput`.
        assistant_turns, user_turns: number of responses of the model, and of rounds of tool responses.
        tool_rewards: rewards of the calls so far.
        extra_fields: values that tools store. Numbers, strings, and lists and dicts of them become columns of the
            batch; other values are dropped at the end of the sample.
    """

    messages: list[dict[str, Any]]
    tools_kwargs: Mapping[str, Any] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    prompt_ids: list[int] = field(default_factory=list)
    response_ids: list[int] = field(default_factory=list)
    response_mask: list[int] = field(default_factory=list)
    response_logprobs: list[float] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    sampling_masks: SamplingMasks = field(default_factory=lambda: SamplingMasks.full(0))
    assistant_turns: int = 0
    user_turns: int = 0
    tool_rewards: list[float] = field(default_factory=list)
    extra_fields: dict[str, Any] = field(default_factory=dict)

    def add_response(self, response: TokenOutput, max_tokens: int) -> None:
        """Append the tokens of the model unchanged, at most `max_tokens` of them."""
        tokens = response.token_ids[:max_tokens]
        self.response_ids += tokens
        self.response_mask += [1] * len(tokens)
        self.response_logprobs += response.log_probs[: len(tokens)]
        self.weight_versions += response.weight_versions[: len(tokens)]
        self.sampling_masks += response.sampling_masks[: len(tokens)]
        self.assistant_turns += 1

    def add_tool_responses(self, tokens: list[int], with_log_probs: bool) -> None:
        """Append tokens that the model did not generate."""
        if len(self.sampling_masks):
            self.sampling_masks += SamplingMasks.full(len(tokens))
        self.response_ids += tokens
        self.response_mask += [0] * len(tokens)
        self.response_logprobs += [0.0] * len(tokens) if with_log_probs else []
        self.weight_versions += [-1] * len(tokens)
        self.user_turns += 1
