"""Checks of the rows of data files, and of prompt lengths against `data.max_prompt_length`.

A run reads its rows after its processes have started; `verl check` reads them before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verl.config.ppo import PPOConfig
from verl.preflight.checks.agent import agent_name_problem
from verl.preflight.findings import Findings
from verl.preflight.light_tokenizer import LightTokenizer
from verl.preflight.plan import PromptLengths
from verl.utils.dataset.files import JsonRows, ParquetRows, data_paths, read_rows, row_name
from verl.utils.dataset.prompts import (
    Messages,
    check_messages,
    check_template_kwargs,
    prefix_errors,
    prompt_token_ids,
)
from verl.utils.dataset.tools_kwargs import read_tools_kwargs
from verl.utils.reward_score import require_scorer

# Rows of each file that are checked.
MAX_ROWS = 20_000
# Training prompts that are measured.
SAMPLE_SIZE = 256
# Share of unknown tokens above which there is a warning; single odd characters do not matter.
_MAX_UNKNOWN = 0.02
_MEDIA = ("images", "videos", "audios")

# A row of a data file; its columns are the user's.
_Row = dict[str, Any]
# Place of a prompt, for error messages, and its messages.
_Prompt = tuple[str, Messages]


def check_rows(config: PPOConfig, found: Findings) -> PromptLengths | None:
    """Read the data files that `check_data` accepted; return the lengths of training prompts, None if not measured."""
    data = config.data
    if data.custom_cls.path:
        return None
    sample: list[_Prompt] = []
    for field, files in (("data.train_files", data.train_files), ("data.val_files", data.val_files)):
        try:
            opened = [read_rows(path, data.prompt_key) for path in data_paths(files or [])]
        except (OSError, ValueError):
            continue  # `check_data` reports it
        for rows in opened:
            if data.prompt_key not in rows.columns:
                continue  # `check_data` reports it
            problem = _first_problem(rows, config)
            if problem is not None:
                found.errors.append(f"{field}: {problem}")
            elif field == "data.train_files":
                sample += _sample(rows, data.prompt_key, SAMPLE_SIZE // len(opened) or 1)
    return _measure(config, sample, found) if sample else None


def _first_problem(rows: ParquetRows | JsonRows, config: PPOConfig) -> str | None:
    """Return place and problem of the first row that cannot be used, or None."""
    key, source = config.data.prompt_key, config.data.reward_fn_key
    try:
        rows.require_text((key, source, "reward_model", "agent_name"))
        for number, row in enumerate(rows.read(0, MAX_ROWS, rows.columns)):
            with prefix_errors(row_name(rows.path, number)):
                check_messages(row.get(key), key)
                _check_columns(row, config)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return None


def _check_columns(row: _Row, config: PPOConfig) -> None:
    """Check the columns that are not the prompt.

    Raises:
        ValueError, NotImplementedError: the run cannot use the row, or has no scorer for it.
    """
    for column in _MEDIA:
        if row.get(column):
            raise ValueError(f"has {column}, which are not supported; use text prompts only")
    for column in ("reward_model", "extra_info"):
        if not isinstance(row.get(column), dict | None):
            raise ValueError(
                f"{column!r} is a {type(row[column]).__name__}; it must be a dict (a struct column in Parquet)"
            )
    if (problem := agent_name_problem(config, row.get("agent_name"))) is not None:
        raise ValueError(problem)
    read_tools_kwargs(row.get("extra_info") or {})
    if config.reward.custom_reward_function.path is not None or config.reward.scored_by_model:
        return
    source = row.get(config.data.reward_fn_key)
    require_scorer("unknown" if source is None else str(source))
    truth = (row.get("reward_model") or {}).get("ground_truth")
    if truth is None:
        raise ValueError("'reward_model.ground_truth' is missing; every row needs the correct answer")


def _sample(rows: ParquetRows | JsonRows, key: str, size: int) -> list[_Prompt]:
    """Return `size` evenly spaced prompts, including the first and the last row."""
    count = len(rows)
    numbers = sorted({i * (count - 1) // max(1, size - 1) for i in range(size)}) if count > size else range(count)
    return [(row_name(rows.path, n), check_messages(rows[n].get(key), key)) for n in numbers]


def _measure(config: PPOConfig, sample: list[_Prompt], found: Findings) -> PromptLengths | None:
    """Tokenize prompts; report unknown text and prompts that are too long."""
    model, data = config.actor_rollout_ref.model, config.data
    folder = model.tokenizer_path or model.path or ""
    if not (Path(folder) / "tokenizer.json").is_file():
        found.notes.append("prompts are not measured: there is no tokenizer.json")
        return None
    try:
        tokenizer = LightTokenizer(folder)
        variables = check_template_kwargs(data.apply_chat_template_kwargs or {})
        prompts = [prompt_token_ids(tokenizer, messages, variables) for _, messages in sample]
    except ValueError as error:
        found.errors.append(f"data.train_files: cannot tokenize prompts: {error}")
        return None
    lengths = [len(prompt) for prompt in prompts]
    unknown_id = tokenizer.unk_token_id
    unknown = 0 if unknown_id is None else sum(prompt.count(unknown_id) for prompt in prompts) / max(1, sum(lengths))
    if unknown > _MAX_UNKNOWN:
        found.warnings.append(
            f"data.train_files: the tokenizer in {folder} does not know {unknown:.0%} of the tokens in {len(prompts)} "
            "prompts, and the model cannot tell unknown tokens apart; use a model whose tokenizer knows this text"
        )
    overlong = [i for i, length in enumerate(lengths) if length > data.max_prompt_length]
    measured = PromptLengths(len(lengths), sorted(lengths)[len(lengths) // 2], max(lengths), len(overlong))
    if overlong:
        _report_overlong(config, sample[overlong[0]][0], lengths[overlong[0]], measured, found)
    return measured


def _report_overlong(config: PPOConfig, where: str, length: int, measured: PromptLengths, found: Findings) -> None:
    """Report prompts that are too long.

    Args:
        where: place of the first one.
        length: its tokens.
    """
    data = config.data
    text = (
        f"data.max_prompt_length={data.max_prompt_length}: {measured.over} of {measured.measured} prompts have more "
        f"tokens, the longest {measured.longest}"
    )
    if data.filter_overlong_prompts:
        if measured.over == measured.measured:
            found.errors.append(
                f"{text}; data.filter_overlong_prompts=True would drop all prompts; raise it to {measured.longest}"
            )
        else:
            found.warnings.append(
                f"{text}; data.filter_overlong_prompts=True drops them; raise it to {measured.longest} to keep them"
            )
    elif data.truncation == "error":
        found.errors.append(
            f"{text}; the run would stop at the first one, {where}, with {length} tokens; raise it to "
            f"{measured.longest} or more, or set data.filter_overlong_prompts=True"
        )
    else:
        found.warnings.append(
            f"{text}; data.truncation={data.truncation} truncates them; raise it to {measured.longest} to keep them "
            "unchanged"
        )
