"""The user's reward function: load it from its file, call it, and read its return value.

This module runs inside the reward worker processes, so it imports the standard library and small modules
of verl only.
"""

from __future__ import annotations

import inspect
import math
import numbers
import os
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any
from uuid import UUID

from verl.extension.user_modules import import_path
from verl.utils.text import valid_value

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
PATH_KEY = "reward.custom_reward_function.path"
NAME_KEY = "reward.custom_reward_function.name"
KWARGS_KEY = "reward.reward_kwargs"
MODEL_KEY = "reward.reward_model.enable"
MODEL_ARGUMENTS = ("reward_router_address", "reward_model_tokenizer")
_TEXT_TYPES = (date, time, timedelta, PurePath, UUID, complex)


class RewardFunctionError(ValueError):
    """The configured reward function cannot be used: missing file or function, or a failed import."""


class BadReturnError(ValueError):
    """A reward function returned a value that is not a score."""


class NonFiniteScoreError(BadReturnError):
    """A reward function returned NaN or an infinite number as the score."""


@dataclass(frozen=True)
class ScoreFunction:
    """A loaded reward function.

    Attributes:
        call: takes `ARGUMENTS` by keyword; the reward kwargs are already bound.
        is_async: the call returns an awaitable.
        prepare: called with a data source before its first sample is scored, so that slow imports of a built-in
            scorer do not count toward the time limit of a sample; None for a user's function.
    """

    call: Callable[..., Any]
    is_async: bool
    prepare: Callable[[str], None] | None = None


def load_function(
    path: str | None,
    name: str,
    reward_kwargs: Mapping[str, Any],
    model_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> ScoreFunction:
    """Load `name` from the Python file `path`, or the built-in scorers, selected by data source, if `path` is None.

    Args:
        model_kwargs: values of `MODEL_ARGUMENTS` in a run with a reward model.

    Raises:
        RewardFunctionError: the file is missing or does not import, the function is missing, or it cannot be called
            with the four arguments, `reward_kwargs` and `model_kwargs` as keywords.
    """
    prepare = None
    if path is None:
        from verl.utils import reward_score

        function, where, prepare = reward_score.default_compute_score, "the built-in scorers", reward_score.prepare
    else:
        function, where = _function_in(_import_file(path), name, path), f"{name} in {path}"
    kwargs = dict(reward_kwargs)
    clash = sorted(set(kwargs) & {*ARGUMENTS, *model_kwargs})
    if clash:
        raise RewardFunctionError(f"{KWARGS_KEY}: {', '.join(clash)} is set for every sample; choose another name")
    kwargs |= model_kwargs
    _check_signature(function, where, kwargs)

    def call(**sample: Any) -> Any:
        return function(**sample, **kwargs)

    target = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return ScoreFunction(call, inspect.iscoroutinefunction(target), prepare)


def check_path(path: str) -> str:
    """Return the absolute path of a reward file.

    Raises:
        RewardFunctionError: the file does not exist.
    """
    absolute = os.path.abspath(os.path.expanduser(path))
    if not os.path.isfile(absolute):
        raise RewardFunctionError(f"{PATH_KEY}={path}: no such file (looked for {absolute}); give a Python file")
    return absolute


def _import_file(path: str) -> Any:
    path = check_path(path)
    try:
        return import_path(Path(path))
    except BaseException as error:
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        at = f", line {lines[-1]}" if lines else ""
        raise RewardFunctionError(
            f"{PATH_KEY}={path} does not import ({os.path.basename(path)}{at}): {summary}"
        ) from error


def _function_in(module: Any, name: str, path: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if callable(function):
        return function
    found = sorted(
        key
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )
    there = f"it has {', '.join(found)}" if found else "it has no function"
    what = "is not a function" if hasattr(module, name) else "does not exist"
    raise RewardFunctionError(f"{NAME_KEY}={name} {what} in {path}: {there}; set {NAME_KEY} to one of its functions")


def _check_signature(function: Callable[..., Any], where: str, kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS), **kwargs)
    except TypeError as error:
        cure = f"change its arguments or {KWARGS_KEY}"
        if any(name in signature.parameters and name not in kwargs for name in MODEL_ARGUMENTS):
            cure = f"{' and '.join(MODEL_ARGUMENTS)} come from a reward model, so set {MODEL_KEY}=True"
        elif not set(MODEL_ARGUMENTS).isdisjoint(kwargs):
            cure = f"with {MODEL_KEY}=True it needs the parameters {' and '.join(MODEL_ARGUMENTS)}, or **kwargs"
        raise RewardFunctionError(
            f"{where} takes {signature} and cannot be called with the keywords "
            f"{', '.join([*ARGUMENTS, *kwargs])}: {error}; {cure}"
        ) from error


def read_return(value: Any) -> tuple[float, dict[str, Any], str]:
    """Split the return value of a reward function into the score and plain extra values.

    A plain number also becomes the extra value `acc`, which validation reports. An extra value that has no plain form
    becomes text, so that it never costs the score.

    Returns:
        the finite score; a dict of None, bool, int, float, str, and lists and dicts of these; and a note for the user
        on values that became text or were dropped, or "".

    Raises:
        BadReturnError: neither a number nor a dict with a `score`; NaN or infinite.
    """
    if not isinstance(value, Mapping):
        score = _finite(value)
        return score, {"acc": score}, ""
    if "score" not in value:
        keys = ", ".join(map(str, list(value)[:10]))
        raise BadReturnError(f"the reward function returned a dict without 'score' (keys: {keys})")
    score = _finite(value["score"])
    extra: dict[str, Any] = {}
    notes: list[str] = []
    for name, item in value.items():
        key = str(name)
        if key == "score":
            continue
        try:
            extra[key] = plain(item, key, lambda other, where: _as_text(other, where, notes))
        except Exception as error:  # noqa: BLE001 - any method of the user's object may fail
            notes.append(
                f"the reward function returned the extra value '{key}', which is dropped because it cannot be read "
                f"({type(error).__name__}); return numbers, text, lists or dicts"
            )
    return score, valid_value(extra), "; ".join(dict.fromkeys(notes))


def _finite(value: Any) -> float:
    shown = repr(value)[:80]
    number = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if not isinstance(number, numbers.Real | Decimal):
        raise BadReturnError(
            f"the reward function returned {shown} ({type(value).__name__}) as the score; return a float, "
            "or a dict with a float 'score'"
        )
    try:
        score = float(number)
    except (OverflowError, ValueError):  # ValueError: a signaling NaN of Decimal
        score = math.inf
    if not math.isfinite(score):
        raise NonFiniteScoreError(f"the reward function returned the score {shown}; a score must be finite")
    return score


def _refuse(value: Any, key: str) -> Any:
    raise BadReturnError(
        f"the value '{key}' is of type {type(value).__name__}; use numbers, strings, dates, paths, lists or dicts"
    )


def _as_text(value: Any, key: str, notes: list[str]) -> Any:
    text = str(value)
    if text in ("True", "False"):  # the booleans of sympy are no bool
        return text == "True"
    notes.append(
        f"the reward function returned the extra value '{key}' of type {type(value).__name__}, which is stored as "
        "text; return a number or text to choose its form"
    )
    return text


def plain(value: Any, key: str, other: Callable[[Any, str], Any] = _refuse) -> Any:
    """Convert `value` to built-in types, so that the reading process needs no class of the user's file.

    The members of an Enum become their values; other kinds of numbers (Decimal, Fraction, sympy's) int or float; dates,
    times, paths, UUIDs and complex numbers text; sets sorted lists; arrays and tensors lists or numbers.

    Args:
        value: the value.
        key: its name, for messages.
        other: converts a value of another type; its arguments are the value and its name.

    Raises:
        BadReturnError: `other` is not given, and a value is of another type.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value, key, other)
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real | Decimal):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): plain(item, f"{key}.{name}", other) for name, item in value.items()}
    if isinstance(value, set | frozenset):
        value = sorted(value, key=repr)  # the order of a set differs between processes
    if isinstance(value, list | tuple):
        return [plain(item, key, other) for item in value]
    if isinstance(value, bytes | bytearray):
        return bytes(value).decode("utf-8", "backslashreplace")
    if isinstance(value, _TEXT_TYPES):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars included
        return plain(value.tolist(), key, other)
    return other(value, key)
