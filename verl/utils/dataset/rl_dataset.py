"""RLHFDataset: prompts with what their reward needs, from data files with verl's columns."""

from __future__ import annotations

import importlib.machinery
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from verl.utils.dataset.files import data_paths, place, read_rows
from verl.utils.dataset.prompts import (
    Messages,
    check_messages,
    check_template_kwargs,
    located,
    prompt_lengths,
    prompt_token_ids,
    truncated,
)
from verl.utils.proto_columns import object_array
from verl.utils.user_files import import_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl.config import DataConfig

logger = logging.getLogger(__name__)

_TRUNCATIONS = ("error", "left", "right", "middle")
_MEDIA_COLUMNS = ("images", "videos", "audios")


class RLHFDataset(Dataset):
    """Prompts of the rows of one or more files; tokenised when they are asked for.

    Columns of a file: `prompt` (`data.prompt_key`; a list of {role, content}), `data_source` (`data.reward_fn_key`),
    `reward_model` {style, ground_truth}, `ability`, `extra_info` {index, ...}, `agent_name`. Only the prompt has to be.

    An item is a dict: `prompt_token_ids` list[int] (at most `data.max_prompt_length`), `raw_prompt` the messages (not
    if `data.return_raw_chat` is False), `data_source` str ("unknown" if absent), `reward_model` dict, `extra_info`
    dict, `index` (extra_info.index, else the row's number over all files), and every further column under its own
    name, None in rows whose file does not have it.

    A subclass may override `_build_messages` to make the messages from other columns.

    Args:
        data_files: path or paths of .parquet, .json or .jsonl files; `~` is expanded.
        tokenizer: with a chat template.
        config: the `data` section.
        processor: for multi-modal models; only None is supported yet.
        max_samples: rows to keep, drawn with `data.seed` if `data.shuffle` and else the first; -1 for all. Overlong
            prompts are filtered after that.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read or has no rows; a row has no prompt or a wrong one; every prompt is overlong;
            a setting is wrong. Files and rows are named, rows counted from 0.
        NotImplementedError: rows with images, videos or audio.
    """

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        if processor is not None:
            raise NotImplementedError("a processor (multi-modal prompts) is not supported yet: use text prompts")
        _check_settings(config, max_samples)
        self.tokenizer = tokenizer
        self.config = config
        self.template_kwargs = check_template_kwargs(config.apply_chat_template_kwargs or {})
        self._files = [read_rows(path) for path in data_paths(data_files)]
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
        row, where = self._read(position)
        with located(where):
            messages = self._build_messages(row)
            token_ids = prompt_token_ids(self.tokenizer, messages, self.template_kwargs)
            token_ids = truncated(token_ids, self.config.max_prompt_length, self.config.truncation)
            return self._item(row, position, messages, token_ids)

    def _build_messages(self, row: dict[str, Any]) -> Messages:
        """The messages of one row (a dict of all columns); errors need not name the row."""
        return check_messages(row.get(self.config.prompt_key), self.config.prompt_key)

    def _item(self, row: dict[str, Any], position: int, messages: Messages, token_ids: list[int]) -> dict[str, Any]:
        for key in (self.config.prompt_key, *_MEDIA_COLUMNS):
            row.pop(key, None)
        source = row.pop(self.config.reward_fn_key, None)
        reward_model, extra_info = (_dict_cell(row, key) for key in ("reward_model", "extra_info"))
        index = extra_info.get("index")
        own = {
            "prompt_token_ids": token_ids,
            "data_source": "unknown" if source is None else str(source),
            "reward_model": reward_model,
            "extra_info": extra_info,
            "index": position if index is None else index,
        }
        if self.config.return_raw_chat:
            own["raw_prompt"] = messages
        return row | own

    # ---- rows ----------------------------------------------------------------------------------------------------

    def _read(self, position: int) -> tuple[dict[str, Any], str]:
        number = bisect_right(self._starts, position) - 1
        file, row = self._files[number], position - self._starts[number]
        return dict.fromkeys(self._columns) | file[row], place(file.path, row)

    def _check_files(self) -> None:
        """Find what is wrong with whole columns now, not when training reaches the row."""
        key = self.config.prompt_key
        for file in self._files:
            for column in set(_MEDIA_COLUMNS) & set(file.columns):
                row = file.first_row(column, filled=True)
                if row is not None:
                    raise NotImplementedError(
                        f"{place(file.path, row)}: has {column}, which are not supported yet; use text prompts only"
                    )
            if type(self)._build_messages is not RLHFDataset._build_messages:
                continue
            if key not in file.columns:
                raise ValueError(
                    f"data file {file.path} has no column {key!r}, so row 0 and all others have no prompt; its columns "
                    f"are {file.columns}: set data.prompt_key to the one that holds the messages, or add it"
                )
            row = file.first_row(key, filled=False) or 0
            with located(place(file.path, row)):
                check_messages(file[row].get(key), key)

    def _sampled_rows(self, max_samples: int) -> np.ndarray:
        total = self._starts[-1]
        if max_samples == -1 or max_samples >= total:
            return np.arange(total)
        logger.info("keeping %d of %d rows", max_samples, total)
        if not self.config.shuffle:
            return np.arange(max_samples)
        return np.sort(np.random.RandomState(self.config.seed or 0).permutation(total)[:max_samples])

    def _located_messages(self) -> Iterator[tuple[str, Messages]]:
        for position in self._rows:
            row, where = self._read(int(position))
            with located(where):
                messages = self._build_messages(row)
            yield where, messages

    def _filter_overlong(self) -> None:
        limit = self.config.max_prompt_length
        workers = self.config.filter_overlong_prompts_workers or 1
        lengths = np.array(prompt_lengths(self._located_messages(), self.tokenizer, self.template_kwargs, workers))
        kept = self._rows[lengths <= limit]
        if not len(kept):
            files = ", ".join(str(file.path) for file in self._files)
            raise ValueError(
                f"data.filter_overlong_prompts leaves no prompt: all {len(lengths)} of {files} have more than "
                f"data.max_prompt_length={limit} tokens (shortest {lengths.min()}, longest {lengths.max()}); raise "
                f"data.max_prompt_length, to {lengths.max()} to keep all of them"
            )
        if len(kept) < len(self._rows):
            dropped, total = len(self._rows) - len(kept), len(self._rows)
            logger.info(
                "dropped %d of %d prompts with more than %d tokens (longest %d)", dropped, total, limit, max(lengths)
            )
        self._rows = kept


def _check_settings(config: DataConfig, max_samples: int) -> None:
    if config.truncation not in _TRUNCATIONS:
        raise ValueError(f"data.truncation={config.truncation!r}: has to be one of {', '.join(_TRUNCATIONS)}")
    if config.max_prompt_length < 1:
        raise ValueError(f"data.max_prompt_length={config.max_prompt_length}: has to be at least 1 token")
    if max_samples != -1 and max_samples < 1:
        raise ValueError(
            f"data.train_max_samples or data.val_max_samples={max_samples}: has to be at least 1, or -1 for all"
        )


def _dict_cell(row: dict[str, Any], key: str) -> dict[str, Any]:
    value = row.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{key!r} is a {type(value).__name__}; it has to be a dict (a struct column in Parquet)")
    return value or {}


def collate_fn(items: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Items as columns: every key becomes a 1-D object array with one cell an item.

    Raises:
        ValueError: an item has other keys than the first.
    """
    for item in items:
        odd = sorted(items[0].keys() ^ item.keys())
        if odd:
            raise ValueError(
                f"items of one batch differ in their keys {odd}; every item of a dataset needs the same keys"
            )
    return {key: object_array([item[key] for item in items]) for key in items[0]}


def create_rl_dataset(
    data_files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    max_samples: int = -1,
) -> Dataset:
    """`RLHFDataset`, or the class that `data.custom_cls.path` and `data.custom_cls.name` give.

    A custom class takes the keywords data_files, tokenizer, config, processor and max_samples, and gives items with the
    keys of `RLHFDataset`'s.

    Raises:
        FileNotFoundError, ValueError: the custom class cannot be loaded; or as `RLHFDataset`.
    """
    path = config.custom_cls.path
    cls = load_dataset_class(path, config.custom_cls.name) if path else RLHFDataset
    return cls(data_files=data_files, tokenizer=tokenizer, config=config, processor=None, max_samples=max_samples)


def load_dataset_class(path: str, name: str | None) -> type[Dataset]:
    """The class `name` of the Python file `path` (`~` is expanded).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no name, the file does not import, or the name is not a subclass of torch.utils.data.Dataset.
    """
    file = Path(path).expanduser()
    if not name:
        raise ValueError(
            f"data.custom_cls.name is not set, but data.custom_cls.path={path}; give the name of the class"
        )
    if not file.is_file():
        raise FileNotFoundError(f"data.custom_cls.path={path} does not exist; give the Python file of the class {name}")
    if file.suffix not in importlib.machinery.all_suffixes():
        raise ValueError(f"data.custom_cls.path={path} is not a Python file (.py)")
    try:
        module = import_file(file)
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"data.custom_cls.path={path} does not import: {type(error).__name__}: {error}") from error
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Dataset)):
        given = "is not defined there" if cls is None else "is not a subclass of torch.utils.data.Dataset"
        raise ValueError(f"data.custom_cls.name={name} {given} (data.custom_cls.path={path})")
    return cls
