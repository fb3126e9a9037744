"""Prompt tokens from the messages of a row: checks, chat template, truncation, lengths of many prompts."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Protocol

import jinja2

from verl.utils.text import valid_value

Messages = list[dict[str, Any]]

# `prompt_token_ids` sets these itself; another value would change its result.
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools"),
        *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask"),
        *("padding", "truncation", "max_length"),
    }
)
_ROWS_PER_JOB = 500
_EXAMPLE = '[{"role": "user", "content": "..."}]'


class ChatTokenizer(Protocol):
    """The parts of a tokenizer that prompts need; transformers' tokenizers and `LightTokenizer` have them."""

    @property
    def name_or_path(self) -> str: ...

    @property
    def chat_template(self) -> Any: ...

    @property
    def apply_chat_template(self) -> Callable[..., Any]: ...


@contextmanager
def prefix_errors(prefix: str) -> Iterator[None]:
    """Put a prefix, usually the file and the row, before the message of a ValueError or NotImplementedError."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(f"{prefix}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from error


def check_messages(value: Any, key: str) -> Messages:
    """Return the messages of one row, without null fields.

    Parquet adds a null field to all messages if one message has the field.

    Args:
        value: the value in the file.
        key: name of the column, for error messages.

    Raises:
        ValueError: the value is missing, or not a non-empty list of {role: str, content: str}.
        NotImplementedError: the content is a list of parts (images, video, audio).
    """
    if value is None:
        raise ValueError(f"{key!r} is missing; every row needs a prompt such as {_EXAMPLE}")
    if isinstance(value, str):
        raise ValueError(f"{key!r} is a plain string; write it as a list of messages: {_EXAMPLE}")
    if not isinstance(value, list) or not value:
        given = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{key!r} is {given}; it must be a list of messages: {_EXAMPLE}")
    return [_check_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _check_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(
            f"{name} is a {type(message).__name__}; every message must be a dict with role and content: {_EXAMPLE}"
        )
    message = {field: value for field, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(
            f"{name} has no role (it has {sorted(message)}); every message needs role and content: {_EXAMPLE}"
        )
    content = message.get("content")
    if isinstance(content, list):
        raise NotImplementedError(
            f"{name}.content is a list of parts: images, video and audio are not supported yet; use one string of text"
        )
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        given = "missing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{name}.content is {given}; it must be a string: {_EXAMPLE}")
    return message


def check_template_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return `data.apply_chat_template_kwargs` as a dict.

    Raises:
        ValueError: it has a key that verl sets itself.
    """
    reserved = sorted(_RESERVED_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise ValueError(
            f"data.apply_chat_template_kwargs={dict(kwargs)}: {reserved} cannot be set; set variables of the chat "
            "template, such as enable_thinking, and use data.max_prompt_length and data.truncation for lengths"
        )
    return {str(key): value for key, value in kwargs.items()}


def prompt_token_ids(tokenizer: ChatTokenizer, messages: Messages, template_kwargs: Mapping[str, Any]) -> list[int]:
    """Return the token ids of the messages in the chat template, including the generation prompt.

    Raises:
        ValueError: the tokenizer has no chat template, or the template rejects the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model, or add "
            "chat_template.jinja beside tokenizer.json"
        )
    options = {"add_generation_prompt": True, **template_kwargs, "tokenize": True, "return_dict": False}
    try:
        # Messages of data files are valid already, those of a custom dataset may not be.
        return tokenizer.apply_chat_template(valid_value(messages), **options)
    except jinja2.TemplateError as error:
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the chat template rejects messages with the roles {roles}: {error}") from error


def truncate_prompt(token_ids: list[int], max_length: int, truncation: str) -> list[int]:
    """Return at most `max_length` ids.

    Args:
        token_ids: the prompt.
        max_length: in tokens.
        truncation: "left" keeps the end, "right" the beginning, "middle" the first `max_length // 2` and the end;
            "error" raises.

    Raises:
        ValueError: the prompt is too long and truncation is "error".
    """
    if len(token_ids) <= max_length:
        return token_ids
    if truncation == "left":
        return token_ids[-max_length:]
    if truncation == "right":
        return token_ids[:max_length]
    if truncation == "middle":
        head = max_length // 2
        return token_ids[:head] + token_ids[head - max_length :]
    raise ValueError(
        f"the prompt has {len(token_ids)} tokens, data.max_prompt_length={max_length} and data.truncation=error; raise "
        f"data.max_prompt_length to {len(token_ids)} or more, set data.filter_overlong_prompts=True to drop such "
        "rows, or data.truncation=left, right or middle to truncate them"
    )


def prompt_lengths(
    rows: Iterable[tuple[str, Messages]],
    tokenizer: ChatTokenizer,
    template_kwargs: Mapping[str, Any],
    workers: int = 1,
) -> list[int]:
    """Return the number of tokens of each prompt, in order.

    Args:
        rows: (name of the row for error messages, its messages).
        tokenizer: with a chat template.
        template_kwargs: variables of the chat template.
        workers: number of processes. They are used only for more than 500 rows, because their start takes seconds. They
            are spawned, because forking a process with threads of Ray or torch can hang.

    Raises:
        ValueError: see `prompt_token_ids`; the message names the row.
    """
    jobs = _batched(rows, _ROWS_PER_JOB)
    batch = list(islice(jobs, 4 * workers))
    if workers <= 1 or len(batch) <= 1:
        return [n for job in chain(batch, jobs) for n in _lengths(job, tokenizer, template_kwargs)]
    lengths: list[int] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, dict(template_kwargs))) as pool:
        # A few jobs at a time: `map` reads all of its input first, and the messages of a file may not fit in memory.
        while batch:
            lengths += chain.from_iterable(pool.map(_worker_lengths, batch))
            batch = list(islice(jobs, 4 * workers))
    return lengths


def _batched(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part


def _lengths(
    job: list[tuple[str, Messages]], tokenizer: ChatTokenizer, template_kwargs: Mapping[str, Any]
) -> list[int]:
    lengths = []
    for name, messages in job:
        with prefix_errors(name):
            lengths.append(len(prompt_token_ids(tokenizer, messages, template_kwargs)))
    return lengths


_worker_state: tuple[ChatTokenizer, dict[str, Any]] | None = None


def _start_worker(tokenizer: ChatTokenizer, template_kwargs: dict[str, Any]) -> None:
    global _worker_state
    _worker_state = (tokenizer, template_kwargs)


def _worker_lengths(job: list[tuple[str, Messages]]) -> list[int]:
    assert _worker_state is not None, "_start_worker did not run in this process"
    return _lengths(job, *_worker_state)
