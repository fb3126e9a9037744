"""Sample rows of the data files, without a dataset class. Imports no torch."""

from __future__ import annotations

from typing import Any

from verl.config import PPOConfig
from verl.trainer.probes.context import Sample
from verl.utils.dataset.files import data_paths, read_rows, row_name
from verl.utils.dataset.prompts import check_messages
from verl.utils.dataset.reward_columns import pop_reward_columns


def read_samples(config: PPOConfig) -> list[Sample]:
    """Return the first row of the training data and of the validation data, without prompt tokens.

    Files that are missing are left out; the check of the data reports them.
    """
    samples = []
    for files in (config.data.train_files, config.data.val_files):
        try:
            path = data_paths(files or [])[0]
        except (OSError, IndexError):
            continue
        rows = read_rows(path, config.data.prompt_key, head=True)
        samples.append(Sample(row_name(path, 0), _item(rows[0], config)))
    return samples


def _item(row: dict[str, Any], config: PPOConfig) -> dict[str, Any]:
    messages = check_messages(row.pop(config.data.prompt_key, None), config.data.prompt_key)
    return {**row, **pop_reward_columns(row, config.data.reward_fn_key, 0), "raw_prompt": messages}
