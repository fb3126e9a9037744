"""Samplers of the user (`data.sampler`), which choose the training prompts: base classes and loading."""

from __future__ import annotations

import inspect
from collections.abc import Sized
from pathlib import Path
from typing import Any, Protocol

from torch.utils.data import Sampler

from verl.extension.user_class import UserClassError, load_class
from verl.utils.dataset.sampler_class import KEY, SamplerSection, sampler_problem, sampler_spec

STATE_METHODS = ("state_dict", "load_state_dict")


class SamplerConfig(Protocol):
    """The part of the `data` section that this file reads; `verl.config.DataConfig` has it."""

    @property
    def sampler(self) -> SamplerSection: ...


class AbstractSampler(Sampler[int]):
    """Base of samplers, which choose the training prompts and their order.

    A subclass defines

    - `__init__(self, data_source, data_config)`, which is called with these keywords;
    - `__iter__`, one pass: it yields numbers of rows in `data_source`, from 0. Rows may repeat or be left out. After
      the end of a pass, the next one starts; an incomplete batch at the end of a pass is dropped;
    - `__len__`: the number of rows in a pass, from which the run derives its number of training steps.

    Rows are taken from `__iter__` when they are needed, never ahead of time, so a pass may depend on earlier updates.

    With `state_dict` and `load_state_dict`, checkpoints contain the state: dicts, lists, tuples, sets, numbers, text,
    NumPy arrays and tensors. `__iter__` is called after `load_state_dict` and must continue at that state. Without
    them, a resumed run goes through the earlier passes again, up to the row where the checkpoint was written, and warns
    if these rows differ.

    Args:
        data_source: the dataset, an `RLHFDataset` or the user's class; has a length, and items by number.
        data_config: the `data` section. Further keys below `data.sampler`, such as `data.sampler.temperature`, are in
            `data_config.sampler`.
    """

    def __init__(self, data_source: Sized, data_config: Any) -> None:
        pass


class AbstractCurriculumSampler(AbstractSampler):
    """Base of samplers that learn from the training: `update` is called after each training step."""

    def update(self, batch: Any) -> None:
        """Learn from the batch of a finished training step, before the next rows are taken.

        With `trainer.rollout_lag=1` the rows of the next step have already been taken.

        Args:
            batch: the `DataProto` that was trained on, with `rollout.n` samples per row: `token_level_scores`,
                `advantages`, `response_mask` [B, T] and further tensors in `batch.batch`; `index`, `data_source`,
                `extra_info`, `uid` and the reward's extra values [B] in `batch.non_tensor_batch`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no update")


def create_rl_sampler(data_config: SamplerConfig, dataset: Sized) -> AbstractSampler | None:
    """Return a new instance of the class that `data.sampler` selects; None if it selects none.

    Args:
        data_config: the `data` section.
        dataset: the dataset, for the constructor's `data_source`.

    Raises:
        ValueError: the class does not exist or does not import, has another base, lacks a method, overrides one that is
            never called, or does not take the keywords.
    """
    section = data_config.sampler
    problem = sampler_problem(section)
    if problem is not None:
        raise ValueError(problem)
    if section.class_path is None or section.class_name is None:
        return None
    try:
        cls = load_class(sampler_spec(section.class_path, section.class_name), Path.cwd(), AbstractSampler)
    except UserClassError as error:
        raise ValueError(f"{KEY}={section.class_path}: {error}") from error
    _check_methods(cls, section.class_name)
    try:
        inspect.signature(cls).bind(data_source=dataset, data_config=data_config)
    except TypeError as error:
        raise ValueError(
            f"data.sampler.class_name={section.class_name}: cannot be constructed as {section.class_name}("
            f"data_source=..., data_config=...): {error}"
        ) from error
    sampler: AbstractSampler = cls(data_source=dataset, data_config=data_config)
    return sampler


def _check_methods(cls: type, name: str) -> None:
    """Raise a ValueError if a sampler lacks a method, or has one that would never be called."""
    present = {method for method in ("__len__", "update", *STATE_METHODS) if hasattr(cls, method)}
    if cls.__iter__ is Sampler.__iter__:  # type: ignore[attr-defined]
        problem = "define __iter__, which yields the numbers of the rows of a pass"
    elif "__len__" not in present:
        problem = "define __len__, the number of rows in a pass, from which the number of training steps follows"
    elif issubclass(cls, AbstractCurriculumSampler) and cls.update is AbstractCurriculumSampler.update:
        problem = "define update(batch), or derive the class from AbstractSampler"
    elif "update" in present and not issubclass(cls, AbstractCurriculumSampler):
        problem = "update would never be called; derive the class from AbstractCurriculumSampler"
    elif len(present.intersection(STATE_METHODS)) == 1:
        problem = "define both state_dict and load_state_dict, or neither of them"
    else:
        return
    raise ValueError(f"data.sampler.class_name={name}: {problem}")
