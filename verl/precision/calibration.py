"""Calibration prompts: the user's own data, or a few short texts that come with the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl.config.data import DataConfig
from verl.utils.dataset.rl_dataset import RLHFDataset

# Texts of different kinds (arithmetic, code, prose), separated by empty lines.
SHIPPED = Path(__file__).with_name("prompts.txt")
# A prompt is cut to this number of tokens, so that several prompts contribute.
MAX_PROMPT_TOKENS = 256


def shipped_prompts(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[list[int]]:
    """Return the tokens of the package's own texts, without a chat template; `max_tokens` of them at most."""
    texts = SHIPPED.read_text(encoding="utf-8").strip().split("\n\n")
    return _limited((tokenizer(text)["input_ids"] for text in texts), max_tokens)


def data_prompts(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, prompt_key: str
) -> list[list[int]]:
    """Return the tokens of the first prompts of data files, in the chat template.

    Args:
        files: .parquet, .json or .jsonl files with verl's columns.
        tokenizer: with a chat template.
        max_tokens: of all prompts together.
        prompt_key: column of the messages.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError, NotImplementedError: a file is not readable, has no rows or not this column; a prompt is invalid.
    """
    config = DataConfig(prompt_key=prompt_key, max_prompt_length=MAX_PROMPT_TOKENS, truncation="right", shuffle=False)
    dataset = RLHFDataset(list(files), tokenizer, config)
    return _limited((dataset[row]["prompt_token_ids"] for row in range(len(dataset))), max_tokens)


def _limited(prompts: Iterable[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the prompts, each cut to `MAX_PROMPT_TOKENS`, until there are `max_tokens` tokens."""
    kept: list[list[int]] = []
    left = max_tokens
    for prompt in prompts:
        if left <= 0:
            break
        cut = prompt[: min(MAX_PROMPT_TOKENS, left)]
        if cut:
            kept.append(cut)
            left -= len(cut)
    return kept
