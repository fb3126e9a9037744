"""The table of advantage estimators, and what each of them is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from verl.algorithms.registry import F, Registry

ADV_ESTIMATORS = Registry("advantage estimator", "algorithm.adv_estimator")

_CORE = ("token_level_rewards", "response_mask", "index", "config")
_NON_TENSORS = "non_tensor_batch"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def register_adv_est(name: str) -> Callable[[F], F]:
    """Decorator: make a function available as `algorithm.adv_estimator=<name>`.

    The function is called by keyword with those of its parameters that are one of

    - `token_level_rewards` [B, T] float32, `response_mask` [B, T], `index` (array of B group ids) and `config` (the
      `algorithm` section); all four where it takes `**kwargs`;
    - a tensor column of the batch: `old_log_probs` [B, T], `values` [B, T], `reward_baselines` [B], ...;
    - `non_tensor_batch`: by name, object arrays of B, what a reward function returned beside its score among them.

    It returns `(advantages, returns)`, each [B, T] float32. A parameter with a default may be none of these.
    """
    return ADV_ESTIMATORS.register(name)


def get_adv_estimator_fn(name: str) -> Callable[..., Any]:
    """The estimator registered under `name`; ValueError lists the known ones."""
    return ADV_ESTIMATORS.get(name)


def required_columns(function: Callable[..., Any]) -> tuple[str, ...]:
    """Tensor columns that an estimator cannot do without, beside `token_level_rewards` and `response_mask`."""
    return tuple(
        parameter.name
        for parameter in _parameters(function)
        if parameter.default is parameter.empty
        and parameter.kind in _BY_KEYWORD
        and parameter.name not in (*_CORE, _NON_TENSORS)
    )


def estimator_arguments(
    function: Callable[..., Any],
    tensors: Mapping[str, torch.Tensor],
    non_tensors: Mapping[str, np.ndarray],
    index: np.ndarray,
    config: Any,
) -> dict[str, Any]:
    """What an estimator is called with, by keyword: `register_adv_est` says which.

    Args:
        function: the estimator.
        tensors: the batch's tensor columns, `token_level_rewards` and `response_mask` among them.
        non_tensors: its other columns, arrays of B.
        index: B group ids.
        config: the `algorithm` section.

    Raises:
        ValueError: a parameter without a default is no column of this batch.
    """
    offered = {**tensors, _NON_TENSORS: non_tensors, "index": index, "config": config}
    parameters = _parameters(function)
    named = [parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        named += _CORE
    required = {*required_columns(function), *(name for name in _CORE if name in named)}
    for name in named:
        if name in required and name not in offered:
            raise ValueError(_missing(function, name, tensors, non_tensors))
    return {name: offered[name] for name in named if name in offered}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _missing(
    function: Callable[..., Any], name: str, tensors: Mapping[str, torch.Tensor], non_tensors: Mapping[str, np.ndarray]
) -> str:
    if name in non_tensors:
        fix = f"it is no tensor; take it from a parameter {_NON_TENSORS}"
    else:
        fix = f"name one of {', '.join(sorted({*tensors, _NON_TENSORS, *_CORE}))}, or give {name} a default"
    return f"advantage estimator {_called(function)} asks for the column {name}, which this batch does not have: {fix}"


def _called(function: Callable[..., Any]) -> str:
    known = [name for name in ADV_ESTIMATORS.names() if ADV_ESTIMATORS.get(name) is function]
    return " / ".join(known) or function.__qualname__
