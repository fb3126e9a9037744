"""From a row's messages to prompt tokens: checks, chat template, lengths of many prompts, truncation."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import jinja2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

# set by `prompt_token_ids` itself; another value would change what it returns
_RESERVED_TEMPLATE_KWARGS = frozenset(
    {"tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length"}
)
_ROWS_PER_JOB = 500
_EXAMPLE = '[{"role": "user", "content": "..."}]'


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the file and the row in front of the message of a ValueError or NotImplementedError."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(f"{where}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_messages(value: Any, key: str) -> Messages:
    """The messages of one row, without the null fields that Parquet adds to every message when one message has them.

    Args:
        value: what the file holds.
        key: name of the column, for the messages of the errors.

    Raises:
        ValueError: no prompt, or not a non-empty list of {role: str, content: str}.
        NotImplementedError: content made of parts (images, video, audio).
    """
    if value is None:
        raise ValueError(f"{key!r} is missing; every row needs a prompt such as {_EXAMPLE}")
    if isinstance(value, str):
        raise ValueError(f"{key!r} is a plain string; write it as a list of messages: {_EXAMPLE}")
    if not isinstance(value, list) or not value:
        given = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise ValueError(f"{key!r} is {given}; it has to be a list of messages: {_EXAMPLE}")
    return [_check_message(message, f"{key}[{i}]") for i, message in enumerate(value)]


def _check_message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(
            f"{name} is a {type(message).__name__}; every message is a dict with role and content: {_EXAMPLE}"
        )
    message = {field: value for field, value in message.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(
            f"{name} has no role (it has {sorted(message)}); every message needs role and content: {_EXAMPLE}"
        )
    content = message.get("content")
    if isinstance(content, list):
        raise NotImplementedError(
            f"{name}.content is a list of parts: images, video and audio are not supported yet; use text in one string"
        )
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        given = "missing" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{name}.content is {given}; it has to be a string: {_EXAMPLE}")
    return message


def check_template_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`data.apply_chat_template_kwargs` as a plain dict.

    Raises:
        ValueError: a key that the framework sets itself.
    """
    reserved = sorted(_RESERVED_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise ValueError(
            f"data.apply_chat_template_kwargs={dict(kwargs)}: {reserved} cannot be set; give variables of the chat "
            "template, such as enable_thinking, and use data.max_prompt_length and data.truncation for lengths"
        )
    return {str(key): value for key, value in kwargs.items()}


def prompt_token_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, template_kwargs: Mapping[str, Any]
) -> list[int]:
    """Token ids of the messages under the tokenizer's chat template, the opening of the answer included.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned model, or put a "
            "chat_template.jinja next to tokenizer.json"
        )
    options = {"add_generation_prompt": True, **template_kwargs, "tokenize": True, "return_dict": False}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except jinja2.TemplateError as error:
        roles = [message.get("role") for message in messages]
        raise ValueError(f"the chat template refuses messages with the roles {roles}: {error}") from error


def truncated(token_ids: list[int], max_length: int, truncation: str) -> list[int]:
    """At most `max_length` ids.

    Args:
        truncation: "left" keeps the end, "right" the beginning, "middle" the first `max_length // 2` and the end.

    Raises:
        ValueError: too many under truncation="error".
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
        f"data.max_prompt_length to {len(token_ids)} or more, set data.filter_overlong_prompts=True to leave such rows "
        "out, or data.truncation=left, right or middle to cut them"
    )


def prompt_lengths(
    rows: Iterable[tuple[str, Messages]],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    workers: int = 1,
) -> list[int]:
    """Tokens of every prompt, in order.

    Args:
        rows: (where the row is, for errors; its messages).
        workers: processes to tokenise with, started only when there are more than 500 rows (it takes seconds), and
            started afresh (spawn), because forking a process that has Ray or torch threads can hang.

    Raises:
        ValueError: as `prompt_token_ids`, naming the row.
    """
    jobs = _cut(rows, _ROWS_PER_JOB)
    wave = list(islice(jobs, 4 * workers))
    if workers <= 1 or len(wave) <= 1:
        return [n for job in chain(wave, jobs) for n in _lengths(job, tokenizer, template_kwargs)]
    lengths: list[int] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, dict(template_kwargs))) as pool:
        # in waves: `map` takes all it is given at once, and the messages of a large file need not fit in memory
        while wave:
            lengths += chain.from_iterable(pool.map(_worker_lengths, wave))
            wave = list(islice(jobs, 4 * workers))
    return lengths


def _cut(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while part := list(islice(iterator, size)):
        yield part


def _lengths(
    job: list[tuple[str, Messages]], tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> list[int]:
    lengths = []
    for where, messages in job:
        with located(where):
            lengths.append(len(prompt_token_ids(tokenizer, messages, template_kwargs)))
    return lengths


_worker_state: tuple[PreTrainedTokenizerBase, dict[str, Any]] | None = None


def _start_worker(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> None:
    global _worker_state
    _worker_state = (tokenizer, template_kwargs)


def _worker_lengths(job: list[tuple[str, Messages]]) -> list[int]:
    assert _worker_state is not None, "the pool runs _start_worker in every process first"
    return _lengths(job, *_worker_state)
