"""Arguments of an advantage estimator, chosen from the batch by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages.common import ADV_ESTIMATORS
from verl.config import AlgorithmConfig

_CORE = ("token_level_rewards", "response_mask", "index", "config")
_NON_TENSORS = "non_tensor_batch"
_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def required_columns(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the tensor columns that an estimator requires, beside `token_level_rewards` and `response_mask`."""
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
    index: np.ndarray | None,
    config: AlgorithmConfig,
) -> dict[str, Any]:
    """Return the keyword arguments of an estimator; `register_adv_est` lists the possible ones.

    Args:
        function: the estimator.
        tensors: the tensor columns of the batch, including `token_level_rewards` and `response_mask`.
        non_tensors: its other columns, arrays of B.
        index: B group ids; None if the batch has no column `uid`.
        config: the `algorithm` section.

    Raises:
        ValueError: a parameter without a default is not a column of this batch.
    """
    offered = {**tensors, _NON_TENSORS: non_tensors, "config": config}
    if index is not None:
        offered["index"] = index
    parameters = _parameters(function)
    named = [parameter.name for parameter in parameters if parameter.kind in _BY_KEYWORD]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        named += _CORE
    required = {*required_columns(function), *(name for name in _CORE if name in named)}
    if not any(parameter.name == "index" and parameter.default is parameter.empty for parameter in parameters):
        required.discard("index")
    for name in named:
        if name in required and name not in offered:
            raise ValueError(_missing(function, name, tensors, non_tensors))
    return {name: offered[name] for name in named if name in offered}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _missing(
    function: Callable[..., Any], name: str, tensors: Mapping[str, torch.Tensor], non_tensors: Mapping[str, np.ndarray]
) -> str:
    if name == "index":
        fix = "the column uid gives the group of each sample"
    elif name in non_tensors:
        fix = f"it is not a tensor; read it from a parameter {_NON_TENSORS}"
    else:
        fix = f"use one of {', '.join(sorted({*tensors, _NON_TENSORS, *_CORE}))}, or give {name} a default"
    return f"advantage estimator {_name_of(function)} needs the column {name}, which this batch does not have: {fix}"


def _name_of(function: Callable[..., Any]) -> str:
    known = [name for name in ADV_ESTIMATORS.names() if ADV_ESTIMATORS.get(name) is function]
    return " / ".join(known) or function.__qualname__
