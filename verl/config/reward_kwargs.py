"""`reward.reward_kwargs`: which of them the reward manager takes and which the scorer gets."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verl.config.schema import show

if TYPE_CHECKING:
    from verl.config.reward import RewardConfig

KWARGS = "reward.reward_kwargs"
BUFFER = f"{KWARGS}.overlong_buffer_cfg"
OWN_KWARGS = "reward.custom_reward_function.reward_kwargs"
# The dapo manager's, under whichever manager: no scorer has asked for them.
MANAGER_KWARGS = ("max_resp_len", "overlong_buffer_cfg")
_BUFFER_KEYS = ("enable", "len", "penalty_factor", "log")


@dataclass(frozen=True)
class OverlongBuffer:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, equation 13).

    Attributes:
        max_resp_len: length at which the whole penalty is due, in tokens.
        buffer_len: the penalty grows over that many tokens before `max_resp_len`.
        penalty_factor: the whole penalty, taken off the score.
        log: whether each sample reports `overlong_reward` and `overlong`.
    """

    max_resp_len: int
    buffer_len: int
    penalty_factor: float
    log: bool


def scorer_kwargs(reward: RewardConfig) -> dict[str, Any]:
    """Keywords that the scorer gets with every sample: both sections' without those of the manager."""
    shared = {name: value for name, value in (reward.reward_kwargs or {}).items() if name not in MANAGER_KWARGS}
    return {**shared, **(reward.custom_reward_function.reward_kwargs or {})}


def kwargs_problems(reward: RewardConfig) -> list[str]:
    """What is wrong with the keywords, one line a problem: field, value, what to do."""
    own = reward.custom_reward_function.reward_kwargs or {}
    problems = [
        f"{OWN_KWARGS}.{name}={show(own[name])}: is {show(value)} in {KWARGS}; set it in one of them"
        for name, value in (reward.reward_kwargs or {}).items()
        if name in own and name not in MANAGER_KWARGS and own[name] != value
    ]
    return problems + _read_overlong(reward)[1]


def overlong_buffer(reward: RewardConfig) -> OverlongBuffer | None:
    """The soft punishment that the manager applies; None where it applies none.

    Raises:
        ValueError: lists what is wrong with its keys.
    """
    buffer, problems = _read_overlong(reward)
    if problems:
        raise ValueError("; ".join(problems))
    return buffer


def _read_overlong(reward: RewardConfig) -> tuple[OverlongBuffer | None, list[str]]:
    kwargs = reward.reward_kwargs or {}
    given = kwargs.get("overlong_buffer_cfg")
    if reward.reward_manager.name != "dapo" or given is None:
        return None, []
    if not isinstance(given, Mapping):
        return None, [f"{BUFFER}={show(given)}: this is a section; set {BUFFER}.enable, .len and .penalty_factor"]
    problems = [_unknown(name, value) for name, value in given.items() if name not in _BUFFER_KEYS]
    enable, log = given.get("enable", False), given.get("log", False)
    problems += [
        f"{BUFFER}.{name}={show(value)}: give True or False"
        for name, value in (("enable", enable), ("log", log))
        if not isinstance(value, bool)
    ]
    if enable is not True or problems:
        return None, problems
    longest, length, factor = kwargs.get("max_resp_len"), given.get("len"), given.get("penalty_factor", 1.0)
    if not _positive(longest):
        problems.append(
            f"{KWARGS}.max_resp_len{_value(longest)}: the overlong buffer needs the length in tokens that responses "
            "should stay below; set it to data.max_response_length"
        )
    if not _positive(length):
        problems.append(
            f"{BUFFER}.len{_value(length)}: give the tokens before max_resp_len over which the penalty grows, at least "
            f"1, or set {BUFFER}.enable=False"
        )
    elif _positive(longest) and length > longest:
        problems.append(
            f"{BUFFER}.len={length}: is longer than {KWARGS}.max_resp_len={longest}, so that an empty response would "
            f"be punished; give at most {longest}"
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not (math.isfinite(factor) and factor >= 0):
        problems.append(
            f"{BUFFER}.penalty_factor={show(factor)}: is taken off the score of a response of max_resp_len tokens; "
            "give a number, at least 0"
        )
    return (None, problems) if problems else (OverlongBuffer(longest, length, float(factor), log), [])


def _unknown(name: Any, value: Any) -> str:
    near = difflib.get_close_matches(str(name), _BUFFER_KEYS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(_BUFFER_KEYS)}"
    return f"{BUFFER}.{name}={show(value)}: there is no such key; {hint}"


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _value(value: Any) -> str:
    return " is not set" if value is None else f"={show(value)}"
