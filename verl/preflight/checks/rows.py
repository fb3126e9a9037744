"""Rows of the data files, read: the first fault by its row, and the lengths of a sample of prompts.

A run meets these only once its processes are up; `verl check` reads them before.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl.config.ppo import PPOConfig
from verl.preflight.findings import Findings
from verl.preflight.plan import PromptLengths
from verl.utils.dataset.files import JsonRows, ParquetRows, data_paths, read_rows, row_name
from verl.utils.dataset.prompts import Messages, check_messages, check_template_kwargs, prompt_token_ids
from verl.utils.light_tokenizer import LightTokenizer
from verl.utils.reward_score import require_scorer

MOST_ROWS = 20_000
SAMPLE = 256
# Share of unknown tokens: an odd character in a text is nothing to speak of.
_MOST_UNKNOWN = 0.02
_MEDIA = ("images", "videos", "audios")


def check_rows(config: PPOConfig, found: Findings) -> PromptLengths | None:
    """Read the data files whose footers were in order; the lengths of training prompts, None where not measured."""
    data = config.data
    if data.custom_cls.path:
        return None
    sample: list[tuple[str, Messages]] = []
    for field, files in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        try:
            rows = [read_rows(path) for path in data_paths(files or [])]
        except (OSError, ValueError):
            continue  # `check_data` reported it
        for file in rows:
            problem = _first_fault(file, config)
            if problem is not None:
                found.errors.append(f"{field}: {problem}")
            elif field == "data.train_files" and data.prompt_key in file.columns:
                sample += _sample(file, data.prompt_key, SAMPLE // len(rows) or 1)
    return _measure(config, sample, found) if sample else None


def _first_fault(file: ParquetRows | JsonRows, config: PPOConfig) -> str | None:
    prompts = config.data.prompt_key
    if prompts not in file.columns:
        return None  # `check_data` reported it
    for number, row in enumerate(_rows(file, config)):
        try:
            check_messages(row.get(prompts), prompts)
            _check_judge(row, config)
        except (ValueError, NotImplementedError) as error:
            return f"{row_name(file.path, number)}: {error}"
    return None


def _check_judge(row: dict[str, Any], config: PPOConfig) -> None:
    for column in _MEDIA:
        if row.get(column):
            raise ValueError(f"has {column}, which are not supported yet; use text prompts only")
    for column in ("reward_model", "extra_info"):
        if not isinstance(row.get(column), dict | None):
            raise ValueError(
                f"{column!r} is a {type(row[column]).__name__}; it has to be a dict (a struct column in Parquet)"
            )
    if config.reward.custom_reward_function.path is not None:
        return
    source = row.get(config.data.reward_fn_key)
    require_scorer("unknown" if source is None else str(source))
    truth = (row.get("reward_model") or {}).get("ground_truth")
    if truth is None:
        raise ValueError("'reward_model.ground_truth' is missing; every row needs the right answer")


def _rows(file: ParquetRows | JsonRows, config: PPOConfig) -> Iterator[dict[str, Any]]:
    """The first `MOST_ROWS` rows, of the columns that are looked at."""
    wanted = {config.data.prompt_key, config.data.reward_fn_key, "reward_model", "extra_info", *_MEDIA}
    if isinstance(file, ParquetRows):
        columns = [name for name in file.columns if name in wanted]
        for batch in file.table.select(columns).slice(0, MOST_ROWS).to_batches(max_chunksize=1024):
            yield from batch.to_pylist()
        return
    for number in range(min(len(file), MOST_ROWS)):
        yield file[number]


def _sample(file: ParquetRows | JsonRows, key: str, size: int) -> list[tuple[str, Messages]]:
    """Rows at even distances, the last one included."""
    count = len(file)
    numbers = sorted({i * (count - 1) // max(1, size - 1) for i in range(size)}) if count > size else range(count)
    return [(row_name(file.path, n), check_messages(file[n].get(key), key)) for n in numbers]


def _measure(config: PPOConfig, sample: list[tuple[str, Messages]], found: Findings) -> PromptLengths | None:
    model, data = config.actor_rollout_ref.model, config.data
    folder = model.tokenizer_path or model.path or ""
    if not (Path(folder) / "tokenizer.json").is_file():
        found.notes.append("prompts are not measured: there is no tokenizer.json to measure them with")
        return None
    try:
        tokenizer = LightTokenizer(folder)
        variables = check_template_kwargs(data.apply_chat_template_kwargs or {})
        prompts = [prompt_token_ids(tokenizer, messages, variables) for _, messages in sample]
    except ValueError as error:
        found.errors.append(f"data.train_files: prompts cannot be made into tokens: {error}")
        return None
    lengths = [len(prompt) for prompt in prompts]
    unknown = sum(prompt.count(tokenizer.unk_token_id) for prompt in prompts) / max(1, sum(lengths))
    if unknown > _MOST_UNKNOWN:
        found.warnings.append(
            f"data.train_files: {unknown:.0%} of the tokens of {len(prompts)} prompts are text that the tokenizer in "
            f"{folder} does not know, and look all alike to the model; use a model whose tokenizer knows it"
        )
    most = data.max_prompt_length
    over = [i for i, length in enumerate(lengths) if length > most]
    measured = PromptLengths(len(lengths), sorted(lengths)[len(lengths) // 2], max(lengths), len(over))
    if over:
        _report_overlong(config, sample[over[0]][0], lengths[over[0]], measured, found)
    return measured


def _report_overlong(config: PPOConfig, where: str, length: int, measured: PromptLengths, found: Findings) -> None:
    data = config.data
    share = f"{measured.over} of {measured.measured} prompts measured have more tokens, the longest {measured.longest}"
    text = f"data.max_prompt_length={data.max_prompt_length}: {share}"
    if data.filter_overlong_prompts:
        if measured.over == measured.measured:
            found.errors.append(f"{text}: nothing would be left to train on; raise it to {measured.longest}")
        else:
            found.warnings.append(f"{text}, which are dropped; raise it to {measured.longest} to keep them")
    elif data.truncation == "error":
        found.errors.append(
            f"{text}; the first is {where}, with {length}: the run would end there; raise it to {measured.longest} or "
            "more, or set data.filter_overlong_prompts=True"
        )
    else:
        found.warnings.append(
            f"{text}, which are cut (data.truncation={data.truncation}); raise it to {measured.longest} to keep them "
            "whole"
        )
