"""The tokens that a chat template adds around the tokens of the model.

The tokens of the model are never decoded and encoded again: the same text may have several tokenizations, and the
log-probabilities belong to the sampled one. So only the tokens that the template adds are appended to a conversation.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.prompts import Messages, check_template_kwargs, prompt_token_ids
from verl.utils.text import valid_text

logger = logging.getLogger(__name__)

# Placeholder for a response whose tokens are known. No template searches for this text or trims it.
_RESPONSE = "0vErLaNsWeR0"
_PROBE = "0vErLtOoL0"
_QUESTION: Messages = [{"role": "user", "content": "q"}]


class ChatRenderer:
    """Renders prompts and tool responses with a chat template.

    Args:
        tokenizer: must have a chat template that supports the role `tool`.
        template_kwargs: `data.apply_chat_template_kwargs`.

    Raises:
        ValueError: the template rejects or ignores tool responses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]):
        self._tokenizer = tokenizer
        self._kwargs = check_template_kwargs(template_kwargs)
        if _PROBE not in self._after_response([_tool_message(_PROBE)], None):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} ignores messages of the role 'tool', so the model "
                "would never see a tool response; use a model or a chat_template.jinja that supports them"
            )

    def prompt(self, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens of the messages with the tools' schemas, up to the start of the response.

        Raises:
            ValueError: the template rejects the messages.
        """
        return prompt_token_ids(self._tokenizer, messages, {**self._kwargs, "tools": list(tools) or None})

    def shows_tools(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Return True if the template shows the tools in the prompt."""
        return self.prompt(_QUESTION, tools) != self.prompt(_QUESTION, [])

    def tool_responses(self, last_token: int, texts: Sequence[str], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the tokens between a response of the model and its next one.

        These are the end of the turn, unless the model generated it, the tool responses, and the start of the next
        response. They do not depend on the text of the model's response.

        Args:
            last_token: the last token of the model's response.
            texts: one tool response per call.
            tools: schemas of the tools.
        """
        messages = [_tool_message(text) for text in texts]
        added = self._encode(self._after_response(messages, tools))
        ending = self._encode(self._after_response([], tools))
        # A ChatML turn ends with "<|im_end|>\n"; the model generates only the first of the two tokens.
        generated = ending.index(last_token) + 1 if last_token in ending else 0
        return added[generated:]

    def _after_response(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Return the text after a response that `messages` follow; without messages, the end of the response's turn."""
        conversation = [*_QUESTION, {"role": "assistant", "content": _RESPONSE}, *messages]
        options = {**self._kwargs, "add_generation_prompt": bool(messages), "tokenize": False, "tools": tools or None}
        try:
            text = self._tokenizer.apply_chat_template(conversation, **options)
            assert isinstance(text, str)  # tokenize=False
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} rejects a response followed by messages of "
                f"the role 'tool': {error}; use a model or a chat_template.jinja that supports them"
            ) from error
        _, found, after = text.partition(_RESPONSE)
        if not found:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path!r} ignores the text of a response")
        return after

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _tool_message(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": valid_text(text)}
