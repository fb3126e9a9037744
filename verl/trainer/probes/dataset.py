"""Probe of the dataset class: built with few rows, two items read and collated, their keys checked."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from verl.agent_loop.agent_loop import AgentLoopOutput
from verl.agent_loop.generation import ScoredSample, to_batch
from verl.trainer.probes.context import Context, Sample
from verl.trainer.rollouts.prompts import to_rows
from verl.utils.dataset.rl_dataset import PromptDataset, collate_fn, create_rl_dataset, load_dataset_class
from verl.workers.reward.loop import RewardResult

MAX_SAMPLES = 8
"""Rows that the class is built with, if it honors `max_samples`."""


def probe(context: Context) -> None:
    """Build the class for the training and the validation data, and send one item of each to the parent."""
    config = context.config
    data = config.data
    name, path = data.custom_cls.name, data.custom_cls.path
    assert path is not None, "this probe is for a class of the user"
    key = f"data.custom_cls.name={name}"
    context.step(f"{key}: the import")
    try:
        load_dataset_class(path, name)
    except ValueError as error:
        context.failed(error)
        return
    tokenizer = context.tokenizer(key)
    if tokenizer is None:
        return
    for field, files, limit in (
        ("data.train_files", data.train_files, data.train_max_samples),
        ("data.val_files", data.val_files, data.val_max_samples),
    ):
        with context.reported(f"{key} with {field}"):
            dataset = _build(context, files, tokenizer, limit)
            if len(dataset) < 1:
                context.error(f"{key} with {field}: has no items; give it at least one")
                continue
            context.samples.append(Sample(f"item 0 of {name}, {field}", _first_row(context, dataset)))
    try:
        context.connection.send(("samples", pickle.dumps(context.samples)))
    except (pickle.PicklingError, TypeError, AttributeError):
        context.note(f"{key}: its items cannot be sent to another process")


def _build(context: Context, files: Any, tokenizer: Any, limit: int) -> PromptDataset:
    """Build the dataset with few rows; with the number of the run if the class does not support fewer."""
    few = MAX_SAMPLES if limit == -1 else min(limit, MAX_SAMPLES)
    try:
        return create_rl_dataset(files, tokenizer, context.config.data, max_samples=few)
    except Exception:
        if few == limit:
            raise
    return create_rl_dataset(files, tokenizer, context.config.data, max_samples=limit)


def _first_row(context: Context, dataset: PromptDataset) -> dict[str, Any]:
    """Read two items as a run does, check the keys that it needs, and return the first one.

    Raises:
        ValueError: an item lacks a key or has a wrong type, or a column has a name that a batch uses.
    """
    rows = to_rows(collate_fn([dataset[0], dataset[min(1, len(dataset) - 1)]]), 0)
    for row in rows:
        for name, value in (("reward_model", row["reward_model"]), ("extra_info", row["extra_info"] or {})):
            if not isinstance(value, Mapping):
                raise ValueError(f"the value {name!r} of an item is a {type(value).__name__}; return a dict")
    output = AgentLoopOutput(prompt_ids=[0], response_ids=[0], response_mask=[1])
    to_batch(
        [ScoredSample(row, output, RewardResult(0.0, {}, None, 0.0)) for row in rows],
        pad_token_id=0,
        with_log_probs=False,
    )
    return rows[0]
