"""What the chat template puts around the model's own tokens, as tokens.

The model's tokens are never decoded and encoded again: that may give other tokens of the same text, whose
log-probabilities nobody sampled. So a conversation grows by what the template would add and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.prompts import Messages, check_template_kwargs, prompt_token_ids

logger = logging.getLogger(__name__)

# Stands for an answer whose tokens are known already; nothing a template looks for, and nothing it trims.
_ANSWER = "0vErLaNsWeR0"
_PROBE = "0vErLtOoL0"
_QUESTION: Messages = [{"role": "user", "content": "q"}]


class ChatRenderer:
    """Prompts and tool responses under one chat template.

    Args:
        tokenizer: with a chat template that knows the role `tool`.
        template_kwargs: `data.apply_chat_template_kwargs`.

    Raises:
        ValueError: the template refuses or ignores tool responses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]):
        self._tokenizer = tokenizer
        self._kwargs = check_template_kwargs(template_kwargs)
        if _PROBE not in self._after_answer([_tool_message(_PROBE)], None):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path!r} leaves out messages of the role 'tool', so the model "
                "would never see what a tool says; use a model or a chat_template.jinja that has them"
            )

    def prompt(self, messages: Messages, tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens of the messages with the tools' schemas, the opening of the answer included.

        Raises:
            ValueError: the template refuses the messages.
        """
        return prompt_token_ids(self._tokenizer, messages, {**self._kwargs, "tools": list(tools) or None})

    def shows_tools(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a prompt with tools is another one than without."""
        return self.prompt(_QUESTION, tools) != self.prompt(_QUESTION, [])

    def tool_responses(self, last_token: int, texts: Sequence[str], tools: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokens that stand between an answer and the next one: the end of the turn, as far as the model has not
        written it itself, the tools' responses, and the opening of the next answer. They do not depend on the answer.

        Args:
            last_token: the answer's last token.
            texts: one response for each call.
            tools: schemas.
        """
        messages = [_tool_message(text) for text in texts]
        added = self._encode(self._after_answer(messages, tools))
        ending = self._encode(self._after_answer([], tools))
        # What the template ends a turn with is "<|im_end|>\n" in ChatML: a model stops after the first of the two.
        written = ending.index(last_token) + 1 if last_token in ending else 0
        return added[written:]

    def _after_answer(self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Text after the content of an answer that `messages` follow; with none, what ends the answer's turn."""
        conversation = [*_QUESTION, {"role": "assistant", "content": _ANSWER}, *messages]
        options = {**self._kwargs, "add_generation_prompt": bool(messages), "tokenize": False, "tools": tools or None}
        try:
            text = self._tokenizer.apply_chat_template(conversation, **options)
        except jinja2.TemplateError as error:
            raise ValueError(
                f"the chat template of {self._tokenizer.name_or_path!r} refuses an answer followed by messages of the "
                f"role 'tool': {error}; use a model or a chat_template.jinja that has them"
            ) from error
        _, found, after = text.partition(_ANSWER)
        if not found:
            raise ValueError(f"the chat template of {self._tokenizer.name_or_path!r} leaves out an answer's text")
        return after

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _tool_message(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}
