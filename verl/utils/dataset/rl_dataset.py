"""RLHFDataset: prompts and reward columns from data files with verl's columns."""

from __future__ import annotations

import copy
import importlib.machinery
import inspect
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from verl.extension.paths import expand_user
from verl.extension.user_class import UserClassError, refuse_uncalled
from verl.extension.user_files import import_file
from verl.utils.dataset.files import data_paths, read_rows, row_name
from verl.utils.dataset.prompts import (
    ChatTokenizer,
    Messages,
    check_messages,
    check_template_kwargs,
    prefix_errors,
    prompt_lengths,
    prompt_token_ids,
    truncate_prompt,
)
from verl.utils.dataset.reward_columns import pop_reward_columns
from verl.utils.proto_columns import object_array

logger = logging.getLogger(__name__)

_TRUNCATIONS = ("error", "left", "right", "middle")
_MEDIA_COLUMNS = ("images", "videos", "audios")


class CustomClass(Protocol):
    """The keys of `data.custom_cls`."""

    path: str | None
    name: str | None


class DatasetConfig(Protocol):
    """The keys of the `data` section that this file reads; `verl.config.DataConfig` has them."""

    prompt_key: str
    reward_fn_key: str
    max_prompt_length: int
    truncation: str
    filter_overlong_prompts: bool
    filter_overlong_prompts_workers: int | None
    apply_chat_template_kwargs: dict[str, Any]
    return_raw_chat: bool
    shuffle: bool
    seed: int | None

    @property
    def custom_cls(self) -> CustomClass: ...


class PromptDataset(Protocol):
    """A dataset of prompts: `RLHFDataset`, or a class of the user; items have the keys of `RLHFDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class RLHFDataset(Dataset[dict[str, Any]]):
    """Prompts of the rows of one or more files; a prompt is tokenized on access.

    Columns of a file: `prompt` (`data.prompt_key`; a list of {role, content}), `data_source` (`data.reward_fn_key`),
    `reward_model` {style, ground_truth}, `ability`, `extra_info` {index, ...}, `agent_name`. Only the prompt is
    required.

    An item is a dict:

    - `prompt_token_ids`: list[int], at most `data.max_prompt_length`;
    - `raw_prompt`: the messages; missing if `data.return_raw_chat` is False;
    - `data_source`: str, "unknown" without the column;
    - `reward_model`, `extra_info`: dict, empty without the column;
    - `index`: extra_info.index, else the number of the row over all files;
    - every other column under its own name, None in rows whose file does not have it.

    A subclass may override `_build_messages` to build the messages from other columns, and `__getitem__` to change an
    item; a changed `raw_prompt` is tokenized again unless the subclass also sets `prompt_token_ids`.

    Args:
        data_files: path or paths of .parquet, .json or .jsonl files; `~` is expanded.
        tokenizer: with a chat template.
        config: the `data` section.
        processor: for multi-modal models; must be None, others are not supported yet.
        max_samples: number of rows to keep, -1 for all. They are drawn with `data.seed` if `data.shuffle` is set, else
            they are the first ones. Overlong prompts are filtered afterwards.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not readable or has no rows; a prompt is missing or invalid; all prompts are overlong; a
            setting is invalid. The message names file and row; rows are counted from 0.
        NotImplementedError: rows with images, videos or audio.
    """

    uncalled_methods: ClassVar[Mapping[str, str]] = {
        "_download": "give local files in data.train_files and data.val_files",
        "_read_files_and_tokenize": "override _build_messages, which gets the columns of one row, or write the rows to "
        "a file first; `examples/data_preprocess` does this",
        "maybe_filter_out_long_prompts": "set data.filter_overlong_prompts=True, or leave the rows out of the file",
        "resume_dataset_state": "leave it out; a resumed run reads the files again and continues at the exact sample",
        "split": "leave it out; the driver reads the whole dataset",
        **dict.fromkeys(
            (
                "process_vision_info",
                "process_multi_modal_info",
                "_process_multi_modal_info",
                "_extract_audio_info",
            ),
            "images, videos and audio are not supported yet; use text prompts",
        ),
    }

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path],
        tokenizer: ChatTokenizer,
        config: DatasetConfig,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        if processor is not None:
            raise NotImplementedError("a processor (multi-modal prompts) is not supported yet: use text prompts")
        _check_settings(config, max_samples)
        self.tokenizer = tokenizer
        self.config = config
        self.template_kwargs = check_template_kwargs(config.apply_chat_template_kwargs or {})
        self._files = [read_rows(path, config.prompt_key) for path in data_paths(data_files)]
        self._starts = np.cumsum([0, *(len(file) for file in self._files)]).tolist()
        self._columns = list(dict.fromkeys(name for file in self._files for name in file.columns))
        self._check_files()
        self._rows = self._sampled_rows(max_samples)
        if config.filter_overlong_prompts:
            self._filter_overlong()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> dict[str, Any]:
        position = int(self._rows[item])
        row, name = self._read(position)
        with prefix_errors(name):
            messages = self._messages(row)
            return self._item(row, position, messages, self._tokenize(messages))

    def _tokenize(self, messages: Messages) -> list[int]:
        token_ids = prompt_token_ids(self.tokenizer, messages, self.template_kwargs)
        return truncate_prompt(token_ids, self.config.max_prompt_length, self.config.truncation)

    def _messages(self, row: dict[str, Any]) -> Messages:
        """Call `_build_messages`; an override may also have upstream verl's second parameter, the prompt's column.

        Raises:
            ValueError: an override returns something else than messages, of which a chat template can make any text.
        """
        build: Callable[..., Messages] = self._build_messages
        arguments = (row, self.config.prompt_key) if len(inspect.signature(build).parameters) > 1 else (row,)
        messages = build(*arguments)
        own = type(self)._build_messages is RLHFDataset._build_messages
        return messages if own else check_messages(messages, "the result of _build_messages")

    def _build_messages(self, row: dict[str, Any]) -> Messages:
        """Return the messages of one row, a dict of all columns. Errors need not name the row, the caller adds it."""
        return check_messages(row.get(self.config.prompt_key), self.config.prompt_key)

    def _item(self, row: dict[str, Any], position: int, messages: Messages, token_ids: list[int]) -> dict[str, Any]:
        for key in (self.config.prompt_key, *_MEDIA_COLUMNS):
            row.pop(key, None)
        item = pop_reward_columns(row, self.config.reward_fn_key, position)
        # Only an override of __getitem__ can change the messages afterwards.
        is_final = type(self).__getitem__ is _GETITEM
        item["prompt_token_ids"] = token_ids if is_final else _OwnTokens(token_ids, messages)
        if self.config.return_raw_chat:
            item["raw_prompt"] = messages
        return row | item

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _read(self, position: int) -> tuple[dict[str, Any], str]:
        number = bisect_right(self._starts, position) - 1
        file, row = self._files[number], position - self._starts[number]
        return dict.fromkeys(self._columns) | file[row], row_name(file.path, row)

    def _check_files(self) -> None:
        """Check whole columns at the start, so that training does not fail at a later row."""
        key = self.config.prompt_key
        for file in self._files:
            file.require_text((key, self.config.reward_fn_key, "reward_model", "agent_name"))
            for column in set(_MEDIA_COLUMNS) & set(file.columns):
                row = file.first_row(column, filled=True)
                if row is not None:
                    raise NotImplementedError(
                        f"{row_name(file.path, row)}: has {column}, which are not supported yet; use text prompts"
                    )
            if type(self)._build_messages is not RLHFDataset._build_messages:
                continue
            if key not in file.columns:
                raise ValueError(
                    f"data file {file.path} has no column {key!r}, so row 0 and all others have no prompt; its columns "
                    f"are {file.columns}: set data.prompt_key to the column of the messages, or add it"
                )
            row = file.first_row(key, filled=False) or 0
            with prefix_errors(row_name(file.path, row)):
                check_messages(file[row].get(key), key)

    def _sampled_rows(self, max_samples: int) -> np.ndarray:
        total = self._starts[-1]
        if max_samples == -1 or max_samples >= total:
            return np.arange(total)
        logger.info("keeping %d of %d rows", max_samples, total)
        if not self.config.shuffle:
            return np.arange(max_samples)
        return np.sort(np.random.RandomState(self.config.seed or 0).permutation(total)[:max_samples])

    def _named_messages(self) -> Iterator[tuple[str, Messages]]:
        for position in self._rows:
            row, name = self._read(int(position))
            with prefix_errors(name):
                messages = self._messages(row)
            yield name, messages

    def _filter_overlong(self) -> None:
        limit = self.config.max_prompt_length
        workers = self.config.filter_overlong_prompts_workers or 1
        lengths = np.array(prompt_lengths(self._named_messages(), self.tokenizer, self.template_kwargs, workers))
        kept = self._rows[lengths <= limit]
        if not len(kept):
            files = ", ".join(str(file.path) for file in self._files)
            raise ValueError(
                f"data.filter_overlong_prompts drops every prompt: all {len(lengths)} of {files} have more than "
                f"data.max_prompt_length={limit} tokens (shortest {lengths.min()}, longest {lengths.max()}); raise "
                f"data.max_prompt_length, to {lengths.max()} to keep all"
            )
        if len(kept) < len(self._rows):
            dropped, total = len(self._rows) - len(kept), len(self._rows)
            logger.info(
                "dropped %d of %d prompts with more than %d tokens (longest %d)", dropped, total, limit, max(lengths)
            )
        self._rows = kept


_GETITEM = RLHFDataset.__getitem__


def _check_settings(config: DatasetConfig, max_samples: int) -> None:
    if config.truncation not in _TRUNCATIONS:
        raise ValueError(f"data.truncation={config.truncation!r}: must be one of {', '.join(_TRUNCATIONS)}")
    if config.max_prompt_length < 1:
        raise ValueError(f"data.max_prompt_length={config.max_prompt_length}: must be at least 1 token")
    if max_samples != -1 and max_samples < 1:
        raise ValueError(
            f"data.train_max_samples or data.val_max_samples={max_samples}: must be at least 1, or -1 for all"
        )


def collate_fn(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return items as columns: tensors [...] are stacked to [B, ...], other values become a 1-D object array of B.

    Raises:
        ValueError: the items do not have the same keys, or tensors of different shapes or dtypes.
    """
    for item in items:
        odd = sorted(items[0].keys() ^ item.keys())
        if odd:
            raise ValueError(
                f"items of one batch differ in their keys {odd}; all items of a dataset must have the same keys"
            )
    return {key: _column(key, [item[key] for item in items]) for key in items[0]}


def _column(key: str, values: list[Any]) -> torch.Tensor | np.ndarray:
    if not all(isinstance(value, torch.Tensor) for value in values):
        return object_array(values)
    kinds = {(tuple(value.shape), str(value.dtype)) for value in values}
    if len(kinds) > 1:
        raise ValueError(
            f"items of one batch have tensors {key!r} of different (shape, dtype): {sorted(kinds)}; pad them to one "
            "shape, or return lists"
        )
    return torch.stack(values)


class _CustomItems(Dataset[dict[str, Any]]):
    """The items of a user's class, with the prompt tokens and the keys that the class leaves out.

    The tokens come from `raw_prompt` if the class sets no `prompt_token_ids`, or changed the `raw_prompt` of an
    `RLHFDataset` and not its tokens.
    """

    def __init__(self, dataset: PromptDataset, tokenizer: ChatTokenizer, config: DatasetConfig) -> None:
        if hasattr(dataset, "state_dict"):
            raise NotImplementedError(
                f"the dataset class {type(dataset).__name__} has a state_dict, which is not supported: only datasets "
                "whose items depend on the index alone can be resumed; remove it"
            )
        self.dataset, self._tokenizer, self._config = dataset, tokenizer, config
        self._template_kwargs = check_template_kwargs(config.apply_chat_template_kwargs or {})

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        name = f"item {index} of {type(self.dataset).__name__}"
        if not isinstance(item, dict):
            raise ValueError(f"{name} is a {type(item).__name__}; return a dict with raw_prompt, a list of messages")
        messages, tokens = item.get("raw_prompt"), item.get("prompt_token_ids")
        if isinstance(tokens, _OwnTokens):
            tokens = None if messages is not None and messages != tokens.messages else list(tokens)
        if tokens is None:
            with prefix_errors(name):
                messages = check_messages(
                    list(messages) if isinstance(messages, np.ndarray) else messages, "raw_prompt"
                )
                tokens = prompt_token_ids(self._tokenizer, messages, self._template_kwargs)
                tokens = truncate_prompt(tokens, self._config.max_prompt_length, self._config.truncation)
        defaults = {"data_source": "unknown", "reward_model": {}, "extra_info": {}, "index": index}
        return {**defaults, **item, "raw_prompt": messages, "prompt_token_ids": tokens}


class _OwnTokens(list[int]):
    """The prompt tokens of an `RLHFDataset`, with a copy of the messages that they were made from."""

    def __init__(self, token_ids: list[int], messages: Messages) -> None:
        super().__init__(token_ids)
        self.messages = copy.deepcopy(messages)


def create_rl_dataset(
    data_files: str | Path | Sequence[str | Path],
    tokenizer: ChatTokenizer,
    config: DatasetConfig,
    *,
    max_samples: int = -1,
) -> PromptDataset:
    """Build an `RLHFDataset`, or the class that `data.custom_cls.path` and `data.custom_cls.name` select.

    A custom class takes the keywords data_files, tokenizer, config, processor and max_samples. Its items have the keys
    of the items of `RLHFDataset`; `raw_prompt` alone is enough.

    Raises:
        FileNotFoundError, ValueError: the custom class cannot be loaded; see also `RLHFDataset`.
    """
    path = config.custom_cls.path
    cls: Callable[..., PromptDataset] = load_dataset_class(path, config.custom_cls.name) if path else RLHFDataset
    dataset = cls(data_files=data_files, tokenizer=tokenizer, config=config, processor=None, max_samples=max_samples)
    if not path:
        return dataset
    return _CustomItems(dataset, tokenizer, config)


def unwrapped(dataset: PromptDataset) -> PromptDataset:
    """Return the dataset of `create_rl_dataset` as the instance of `RLHFDataset` or of the user's class."""
    return dataset.dataset if isinstance(dataset, _CustomItems) else dataset


def load_dataset_class(path: str, name: str | None) -> type[Any]:
    """Import the class `name` from the Python file `path` (`~` is expanded).

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no name is given, the import fails, the class is not a subclass of torch.utils.data.Dataset, it
            overrides a method of upstream verl's class that is never called, or it does not take the keywords.
    """
    file = expand_user(path)
    if not name:
        raise ValueError(
            f"data.custom_cls.name is not set, but data.custom_cls.path={path}; set it to the name of the class"
        )
    if not file.is_file():
        raise FileNotFoundError(
            f"data.custom_cls.path={path} does not exist; set it to the Python file of the class {name}"
        )
    if file.suffix not in importlib.machinery.all_suffixes():
        raise ValueError(f"data.custom_cls.path={path} is not a Python file (.py)")
    try:
        module = import_file(file)
    except (Exception, SystemExit) as error:  # a user's file may raise any error
        raise ValueError(f"data.custom_cls.path={path} does not import: {type(error).__name__}: {error}") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Dataset)):
        given = (
            "is not defined in the file; correct the name"
            if cls is None
            else "is not a subclass of torch.utils.data.Dataset"
        )
        raise ValueError(f"data.custom_cls.name={name} {given} (data.custom_cls.path={path})")
    try:
        refuse_uncalled(cls, RLHFDataset)
        inspect.signature(cls).bind(data_files=[], tokenizer=None, config=None, processor=None, max_samples=-1)
    except UserClassError as error:
        raise ValueError(f"data.custom_cls.name={name}: {error}") from error
    except TypeError as error:
        raise ValueError(
            f"data.custom_cls.name={name}: cannot be constructed as {name}(data_files=..., tokenizer=..., config=..., "
            f"processor=..., max_samples=...): {error}"
        ) from error
    return cls
