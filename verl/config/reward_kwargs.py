"""`reward.reward_kwargs`: the entries that the reward manager reads, and those that the scorer gets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from verl.config.errors import unknown_key
from verl.config.reward import MANAGER_KWARGS, RewardConfig
from verl.config.schema import show

KWARGS = "reward.reward_kwargs"
BUFFER = f"{KWARGS}.overlong_buffer_cfg"
OWN_KWARGS = "reward.custom_reward_function.reward_kwargs"
_BUFFER_KEYS = ("enable", "len", "penalty_factor", "log")


@dataclass(frozen=True)
class OverlongBuffer:
    """DAPO's soft penalty for long responses (arXiv 2503.14476, equation 13).

    Attributes:
        max_resp_len: length from which the full penalty applies, in tokens.
        buffer_len: number of tokens before `max_resp_len` over which the penalty grows.
        penalty_factor: the full penalty, which is subtracted from the score.
        log: each sample reports `overlong_reward` and `overlong`.
    """

    max_resp_len: int
    buffer_len: int
    penalty_factor: float
    log: bool


def scorer_kwargs(reward: RewardConfig) -> dict[str, Any]:
    """Return the keyword arguments of the scorer: entries of both sections except those of the manager."""
    shared = {name: value for name, value in (reward.reward_kwargs or {}).items() if name not in MANAGER_KWARGS}
    return {**shared, **(reward.custom_reward_function.reward_kwargs or {})}


def kwargs_problems(reward: RewardConfig) -> list[str]:
    """Return the errors of both sections of keyword arguments, one text per problem."""
    own = reward.custom_reward_function.reward_kwargs or {}
    problems = [
        f"{OWN_KWARGS}.{name}={show(own[name])}: {KWARGS}.{name} is {show(value)}; set it in one place only"
        for name, value in (reward.reward_kwargs or {}).items()
        if name in own and name not in MANAGER_KWARGS and own[name] != value
    ]
    return problems + _read_overlong_buffer(reward)[1]


def overlong_buffer(reward: RewardConfig) -> OverlongBuffer | None:
    """Return the penalty for long responses that the manager applies; None if it applies none.

    Raises:
        ValueError: keys of the penalty are wrong; the message lists all problems.
    """
    buffer, problems = _read_overlong_buffer(reward)
    if problems:
        raise ValueError("; ".join(problems))
    return buffer


def _read_overlong_buffer(reward: RewardConfig) -> tuple[OverlongBuffer | None, list[str]]:
    """Return the penalty, or None if it is off or wrong, and the problems of its keys."""
    kwargs = reward.reward_kwargs or {}
    given = kwargs.get("overlong_buffer_cfg")
    if reward.reward_manager.name != "dapo" or given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"{BUFFER}={show(given)}: this is a section; set {BUFFER}.enable, .len and .penalty_factor"]
    problems = [_unknown_buffer_key(str(name)) for name in given if name not in _BUFFER_KEYS]
    enable, log = given.get("enable", False), given.get("log", False)
    problems += [
        f"{BUFFER}.{name}={show(value)}: must be True or False"
        for name, value in (("enable", enable), ("log", log))
        if not isinstance(value, bool)
    ]
    if enable is not True or problems:
        return None, problems
    max_length: Any = kwargs.get("max_resp_len")
    length: Any = given.get("len")
    factor: Any = given.get("penalty_factor", 1.0)
    if not _is_positive_int(max_length):
        problems.append(
            f"{KWARGS}.max_resp_len{_value(max_length)}: must be the length in tokens from which the full penalty of "
            "the overlong buffer applies; set it to data.max_response_length"
        )
    if not _is_positive_int(length):
        problems.append(
            f"{BUFFER}.len{_value(length)}: must be the number of tokens before max_resp_len over which the penalty "
            f"grows, at least 1; or set {BUFFER}.enable=False"
        )
    elif _is_positive_int(max_length) and length > max_length:
        problems.append(
            f"{BUFFER}.len={length}: must be at most {KWARGS}.max_resp_len={max_length}, otherwise an empty response "
            f"gets a penalty; use at most {max_length}"
        )
    if not _is_factor(factor):
        problems.append(
            f"{BUFFER}.penalty_factor={show(factor)}: must be a number, at least 0; it is subtracted from the score of "
            "a response with max_resp_len tokens"
        )
    return (None, problems) if problems else (OverlongBuffer(max_length, length, float(factor), log), [])


def _unknown_buffer_key(name: str) -> str:
    near = [f"{BUFFER}.{known}" for known in difflib.get_close_matches(name, _BUFFER_KEYS, n=1)]
    return unknown_key(f"{BUFFER}.{name}", near, otherwise=f"use one of {', '.join(_BUFFER_KEYS)}")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_factor(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _value(value: Any) -> str:
    return " is not set" if value is None else f"={show(value)}"
