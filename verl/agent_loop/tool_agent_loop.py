"""The tool loop: the model responds, its tool calls are run, their results are appended, and the model continues."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from verl.agent_loop.agent_data import AgentData
from verl.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput, register
from verl.agent_loop.chat_template import ChatRenderer
from verl.agent_loop.detokenize import decode
from verl.agent_loop.tool_parser import PARSERS, ToolCall, opens_reasoning
from verl.agent_loop.tool_session import Toolbox, ToolSession
from verl.config import PPOConfig
from verl.tools.utils.tool_registry import all_tools
from verl.utils.dataset.prompts import prefix_errors, truncate_prompt
from verl.utils.dataset.tools_kwargs import read_tools_kwargs
from verl.utils.text import valid_text, valid_value
from verl.workers.reward.function import BadReturnError, plain
from verl.workers.rollout.client import LLMServerClient

logger = logging.getLogger(__name__)

# Tokens before a response that may hold the start of the reasoning: a tag of at most 7 characters, and line breaks.
_OPENING_TOKENS = 16


@register("tool_agent")
class ToolAgentLoop(AgentLoopBase):
    """Continues until the model calls no tool, or the token limit or a turn limit is reached.

    Tool responses that leave no room for a token of the model are dropped: a sample ends with a token of the model.

    Args:
        client, tokenizer, config: as in `AgentLoopBase`.
        toolbox, renderer, parse: made by `setup`.
    """

    def __init__(
        self,
        client: LLMServerClient,
        tokenizer: Any,
        config: PPOConfig,
        *,
        toolbox: Toolbox,
        renderer: ChatRenderer,
        parse: Callable[[str, bool], list[ToolCall]],
    ):
        super().__init__(client, tokenizer, config)
        self.toolbox, self.renderer, self.parse = toolbox, renderer, parse

    @classmethod
    def setup(cls, tokenizer: Any, config: PPOConfig) -> dict[str, Any]:
        multi_turn = config.actor_rollout_ref.rollout.multi_turn
        tools = all_tools(multi_turn.tool_config_path, multi_turn.function_tool_path)
        toolbox = Toolbox(
            {tool.name: tool for tool in tools},
            multi_turn.max_tool_response_length,
            multi_turn.tool_response_truncate_side,
        )
        renderer = ChatRenderer(tokenizer, config.data.apply_chat_template_kwargs or {})
        if tools and not renderer.shows_tools(toolbox.schemas()):
            logger.warning(
                "the chat template does not show the tools in the prompt: the model knows %s only from your messages",
                ", ".join(toolbox.tools),
            )
        return {"toolbox": toolbox, "renderer": renderer, "parse": PARSERS[multi_turn.format]}

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        info = row.get("extra_info") or {}
        toolbox = self.toolbox.select(info.get("tool_selection"))
        schemas = toolbox.schemas()
        with prefix_errors(f"row {row.get('index')}"):
            tools_kwargs = read_tools_kwargs(info)
        data = AgentData(list(row["raw_prompt"]), tools_kwargs)
        data.prompt_ids = self._prompt_ids(data.messages, schemas, row.get("index"))
        session = ToolSession(toolbox, data.tools_kwargs, data)
        data.tool_rewards = session.rewards
        try:
            stop_reason = await self._converse(data, session, schemas, sampling_params)
            scores = await session.instance_rewards()
        finally:
            await session.close()
        return AgentLoopOutput(
            prompt_ids=data.prompt_ids,
            response_ids=data.response_ids,
            response_mask=data.response_mask,
            response_logprobs=data.response_logprobs,
            weight_versions=data.weight_versions,
            sampling_masks=data.sampling_masks,
            stop_reason=stop_reason,
            num_turns=1 + data.user_turns + data.assistant_turns,
            extra_fields={
                **_plain_fields(data.extra_fields),
                "tool_rewards": list(session.rewards),
                "rollout_reward_scores": scores,
                "tool_call_counts": session.calls,
                "tool_failures": dict(session.failures),
                "tool_seconds": session.seconds,
            },
        )

    async def _converse(
        self, data: AgentData, session: ToolSession, schemas: list[dict[str, Any]], sampling_params: dict[str, Any]
    ) -> str:
        limits = self.rollout_config.multi_turn
        max_tokens = self._max_response_tokens(len(data.prompt_ids))
        while True:
            left = max_tokens - len(data.response_ids)
            context = data.prompt_ids + data.response_ids
            response = await self.client.generate(
                context,
                {**sampling_params, "max_tokens": min(left, sampling_params.get("max_tokens", left))},
                session=data.request_id,
            )
            data.add_response(response, left)
            if response.stop_reason != "stop":
                return response.stop_reason
            text = decode(self.tokenizer, response.token_ids, skip_special_tokens=False)
            opening = decode(self.tokenizer, context[-_OPENING_TOKENS:], skip_special_tokens=False)
            calls = self.parse(text, opens_reasoning(opening))
            if not calls:
                return "stop"
            if _reached(data.assistant_turns, limits.max_assistant_turns):
                return "turns"
            if _reached(data.user_turns, limits.max_user_turns):
                return "turns"
            if len(data.response_ids) >= max_tokens:
                return "length"
            session.count_dropped(len(calls[limits.max_parallel_calls :]))
            tool_responses = await session.run(calls[: limits.max_parallel_calls])
            data.messages.append({"role": "assistant", "content": text})
            data.messages += [{"role": "tool", "content": text} for text in tool_responses]
            added = self.renderer.tool_responses(response.token_ids[-1], tool_responses, schemas)
            # A final tool response adds nothing to train on, and the score would be placed at a masked token.
            if len(data.response_ids) + len(added) >= max_tokens:
                return "length"
            data.add_tool_responses(added, with_log_probs=bool(response.log_probs))

    def _prompt_ids(self, messages: list[dict[str, Any]], schemas: list[dict[str, Any]], index: Any) -> list[int]:
        # The tokens of the dataset do not include the tools.
        tokens = self.renderer.prompt(messages, schemas)
        try:
            return truncate_prompt(tokens, self.prompt_length, self.config.data.truncation)
        except ValueError:
            raise ValueError(
                f"the prompt of row {index} has {len(tokens)} tokens with the tools' schemas, "
                f"data.max_prompt_length={self.prompt_length} and data.truncation=error; raise data.max_prompt_length "
                f"to {len(tokens)} or more, or shorten the schemas"
            ) from None

    def _max_response_tokens(self, prompt_tokens: int) -> int:
        """Return the smaller of the response limit and the rest of the context length, in tokens."""
        context_length = self.rollout_config.sequence_limit(self.prompt_length, self.response_length)
        return min(self.response_length, context_length - prompt_tokens)


def _reached(turns: int, limit: int | None) -> bool:
    return limit is not None and turns >= limit


def _plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in fields.items():
        try:
            found[valid_text(name)] = valid_value(plain(value, name))
        except (BadReturnError, RecursionError):  # RecursionError: a list or dict that contains itself
            continue
    return found
